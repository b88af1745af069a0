use super::*;
use crate::ops::kernel::panels::PANEL;
use crate::ops::kernel::product::Then;
use crate::ops::reference;
use crate::ops::tensor::Values;

const FINISH: Finish<'static, f32> =
    Finish { outputs: 3, bias: None, per_row: None, scale: None, residual: None, then: Then::Nothing };

#[test]
fn every_output_lies_in_one_tile() {
    let weight = Panels::pack(Format::F32, 3, 9, |_, _| Ok(())).unwrap();
    let x = reference::tensor([1, 1, 1, 1], 1);
    let Values::Host(host) = &x.values else { panic!("a tensor on the host") };
    for (rows, down, across, channels) in [
        (1, 1, 1, 1),
        (3, 5, 7, 5),
        (2, 9, 72, 320),
        (1, 17, 63, 33),
        (2, 64, 64, 2560),
        (1, 3, 1000, 3),
        (5, 1, 65, 8),
    ] {
        for (kernel, stride, wanted) in [((1, 1), 1, 1), ((3, 3), 1, 7), ((3, 3), 2, 1), ((5, 5), 1, 64)] {
            let map = Map { height: down * stride, width: across * stride, channels };
            let windows = Windows { kernel, stride, before: (1, 1), outputs: (down, across) };
            let placing = Placing::dense(down * across, 3);
            let call = Call { host, rows, map, windows, weight: &weight, finish: &FINISH, placing };
            let mut seen = vec![0; rows * down * across];
            for Tile { lines, columns } in call.tiles(wanted) {
                assert!(!lines.is_empty() && !columns.is_empty());
                for place in lines.flat_map(|line| columns.clone().map(move |column| line * across + column)) {
                    seen[place] += 1;
                }
            }
            assert!(seen.iter().all(|times| *times == 1), "{rows} rows of {down} × {across}, {channels} channels");
        }
    }
}

#[test]
fn lines_are_cut_where_a_row_ends() {
    assert_eq!(split(&(0..3), 5), vec![0..3]);
    assert_eq!(split(&(3..12), 5), [3..5, 5..10, 10..12]);
    assert_eq!(split(&(4..6), 1), [4..5, 5..6]);
    assert_eq!(split(&(10..20), 10), vec![10..20]);
}

#[test]
fn slices_cover_all_panels_and_keep_gates_with_their_values() {
    for panels in 1..20 {
        for wanted in [0, 1, 2, 3, 7, 100] {
            for then in [Then::Nothing, Then::Gate] {
                let slices = slices(panels * PANEL - 3, wanted, then);
                assert!(slices.iter().cloned().flatten().eq(0..panels), "{panels} panels in {wanted} slices");
                assert!(slices.len() <= wanted.max(1));
                assert!(then != Then::Gate || slices.iter().all(|slice| slice.start % 2 == 0));
            }
        }
    }
}

/// What an area of a padded map holds, value by value.
fn plain_copy(map: Map, area: Area, from: &[f32], pending: Option<&Pending>, lines: usize) -> Vec<f32> {
    let Map { height, width, channels } = map;
    let mut to = vec![0.0; lines * area.width * area.pixel];
    for (line, column) in (0..lines).flat_map(|line| (0..area.width).map(move |column| (line, column))) {
        let (y, x) = (area.top + line as isize, area.left + column as isize);
        if y < 0 || x < 0 || y >= height as isize || x >= width as isize {
            continue;
        }
        for channel in 0..channels {
            let value = from[((area.row * height + y as usize) * width + x as usize) * channels + channel];
            let value = pending.map_or(f64::from(value), |pending| {
                let at = area.row * channels + channel;
                let value = f64::from(value) * f64::from(pending.scale[at]) + f64::from(pending.shift[at]);
                if pending.silu { reference::silu(value) } else { value }
            });
            to[(line * area.width + column) * area.pixel + channel] = value as f32;
        }
    }
    to
}

fn assert_copied<F: Element, E: Element>(map: Map, area: Area, pending: Option<&Pending>, lines: usize) {
    let count = 2 * map.height * map.width * map.channels;
    let from: Vec<F> = reference::numbers(count, 1).into_iter().map(F::from_f32).collect();
    let seen: Vec<f32> = from.iter().map(|value| value.to_f32()).collect();
    let expected = plain_copy(map, area, &seen, pending, lines);
    let tolerance = if E::FORMAT == Format::F32 { 1e-6 } else { 4e-3 };
    for isa in Isa::available() {
        // Whatever the room held before.
        let mut to = vec![E::from_f32(f32::NAN); expected.len()];
        dispatch(isa, Copy { map, area, from: &from, pending, to: &mut to });
        let to: Vec<f32> = to.into_iter().map(E::to_f32).collect();
        reference::assert_close(&to, &expected, tolerance);
        let padding = |at: &usize| expected[*at].to_bits() == 0;
        assert!((0..to.len()).filter(padding).all(|at| to[at] == 0.0), "{isa} left something in the padding");
    }
}

#[test]
fn an_area_holds_the_map_with_zeros_around_it() {
    for channels in [1, 3, 8, 16, 33, 64] {
        let map = Map { height: 5, width: 7, channels };
        let (scale, shift) = (reference::numbers(2 * channels, 2), reference::numbers(2 * channels, 3));
        let norms = [false, true].map(|silu| Pending { scale: scale.clone(), shift: shift.clone(), silu });
        let pixel = channels.next_multiple_of(2);
        for (row, top, left, width, lines) in [
            (0, 0, 0, 7, 5),
            (1, -1, -1, 9, 7),
            (1, 2, 3, 2, 2),
            (0, 3, 5, 9, 6),
            (1, -3, -4, 4, 3),
            (0, 6, 1, 3, 2),
            (1, 1, 7, 3, 2),
            (0, 1, -5, 3, 2),
            (1, 4, -2, 13, 1),
        ] {
            let area = Area { row, top, left, width, pixel };
            for pending in [None, Some(&norms[0]), Some(&norms[1])] {
                assert_copied::<f32, f32>(map, area, pending, lines);
                assert_copied::<f32, f32>(map, Area { pixel: channels, ..area }, pending, lines);
                assert_copied::<bf16, bf16>(map, area, pending, lines);
                assert_copied::<f32, bf16>(map, area, pending, lines);
                assert_copied::<bf16, f32>(map, area, pending, lines);
            }
        }
    }
}
