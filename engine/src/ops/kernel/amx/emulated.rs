//! A tile unit in plain Rust, after the instructions' descriptions in Intel's manual (Software Developer's
//! Manual, volume 2), faults included.

use super::{Shapes, Tiles};

/// Rows and bytes of a row at most.
const ROWS: usize = 16;
const ROW: usize = 64;

#[derive(Clone)]
struct Tile {
    rows: usize,
    row_bytes: usize,
    values: [[u8; ROW]; ROWS],
}

const UNUSED: Tile = Tile { rows: 0, row_bytes: 0, values: [[0; ROW]; ROWS] };

pub(super) struct Emulated {
    tiles: [Tile; 8],
}

impl Emulated {
    pub fn new() -> Self {
        Self { tiles: [UNUSED; 8] }
    }

    fn tile(&self, tile: u8) -> &Tile {
        let tile = &self.tiles[usize::from(tile)];
        assert!(tile.rows > 0, "a tile without a shape is an illegal instruction");
        tile
    }
}

/// Denormals are zeros, on the way in and on the way out.
fn flushed(value: f32) -> f32 {
    if value.is_subnormal() { 0f32.copysign(value) } else { value }
}

fn wide(pair: &[u8], index: usize) -> f32 {
    flushed(f32::from_bits(u32::from(u16::from_le_bytes([pair[2 * index], pair[2 * index + 1]])) << 16))
}

impl Tiles for Emulated {
    fn configure(&mut self, shapes: &Shapes) {
        // The bytes that the processor would see.
        // SAFETY: 64 bytes without gaps.
        let bytes: [u8; 64] = unsafe { std::mem::transmute(shapes.clone()) };
        assert_eq!(bytes[0], 1, "the palette");
        assert!(bytes[1..16].iter().all(|byte| *byte == 0), "start row and reserved bytes");
        for (index, tile) in self.tiles.iter_mut().enumerate() {
            let row_bytes = usize::from(u16::from_le_bytes([bytes[16 + 2 * index], bytes[17 + 2 * index]]));
            let rows = usize::from(bytes[48 + index]);
            assert!(rows <= ROWS && row_bytes <= ROW && (rows == 0) == (row_bytes == 0), "a tile's shape");
            *tile = Tile { rows, row_bytes, ..UNUSED };
        }
        assert!(bytes[32..48].iter().chain(&bytes[56..]).all(|byte| *byte == 0), "there are eight tiles");
    }

    fn zero<const TILE: u8>(&mut self) {
        let Tile { rows, row_bytes, .. } = *self.tile(TILE);
        self.tiles[usize::from(TILE)] = Tile { rows, row_bytes, ..UNUSED };
    }

    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize) {
        self.zero::<TILE>();
        let tile = &mut self.tiles[usize::from(TILE)];
        for (row, values) in tile.values.iter_mut().enumerate().take(tile.rows) {
            // SAFETY: the caller's promise.
            unsafe { from.add(row * stride).copy_to_nonoverlapping(values.as_mut_ptr(), tile.row_bytes) }
        }
    }

    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize) {
        let tile = self.tile(TILE);
        for (row, values) in tile.values.iter().enumerate().take(tile.rows) {
            // SAFETY: the caller's promise.
            unsafe { to.add(row * stride).copy_from_nonoverlapping(values.as_ptr(), tile.row_bytes) }
        }
    }

    fn multiply<const TO: u8, const A: u8, const B: u8>(&mut self) {
        assert!(TO != A && TO != B && A != B, "three different tiles");
        let (a, b, mut to) = (self.tile(A), self.tile(B), self.tile(TO).clone());
        assert!(to.rows == a.rows && a.row_bytes == 4 * b.rows && to.row_bytes == b.row_bytes, "shapes");
        for row in 0..to.rows {
            // First and second values of the pairs are summed apart, and meet only at the end.
            let mut products = [[0f32; 2]; ROW / 4];
            for pair in 0..a.row_bytes / 4 {
                for (column, sums) in products.iter_mut().enumerate().take(to.row_bytes / 4) {
                    let (a, b) = (&a.values[row][4 * pair..], &b.values[pair][4 * column..]);
                    for (index, sum) in sums.iter_mut().enumerate() {
                        *sum = flushed(wide(a, index).mul_add(wide(b, index), *sum));
                    }
                }
            }
            for (value, sums) in to.values[row].chunks_exact_mut(4).zip(products).take(to.row_bytes / 4) {
                let before = flushed(f32::from_le_bytes([value[0], value[1], value[2], value[3]]));
                let sum = flushed(before + flushed(sums[0] + sums[1]));
                value.copy_from_slice(&sum.to_le_bytes());
            }
        }
        self.tiles[usize::from(TO)] = to;
    }

    fn prefetch(&self, _at: *const u8) {}
}

mod tests {
    use half::bf16;

    use super::super::{LEFT, RIGHT, SUMS};
    use super::*;

    /// 1×1: what one instruction makes of pairs.
    fn multiplied(left: [[f32; 2]; 2], right: [[f32; 2]; 2], before: f32) -> f32 {
        let bytes = |pairs: [[f32; 2]; 2]| {
            let values = pairs.as_flattened().iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes());
            values.collect::<Vec<u8>>()
        };
        let mut right_rows = [[0u8; 64]; 2];
        for (row, pair) in right_rows.iter_mut().zip(bytes(right).chunks_exact(4)) {
            row[..4].copy_from_slice(pair);
        }
        let mut sums = [before; 16];
        let mut unit = Emulated::new();
        unit.configure(&Shapes::new(1, 2));
        // SAFETY: one row of two pairs, two rows of 64 bytes, one row of 64 bytes.
        unsafe {
            unit.load::<SUMS>(sums.as_ptr().cast(), 64);
            unit.load::<LEFT>(bytes(left).as_ptr(), 64);
            unit.load::<RIGHT>(right_rows.as_ptr().cast(), 64);
            unit.multiply::<SUMS, LEFT, RIGHT>();
            unit.store::<SUMS>(sums.as_mut_ptr().cast(), 64);
        }
        sums[0]
    }

    #[test]
    fn the_emulated_unit_rounds_like_the_instruction() {
        assert_eq!(multiplied([[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]], 0.5), 70.5);
        // The first values of the pairs meet before the second ones: here they cancel, and nothing is lost.
        assert_eq!(multiplied([[1.0, 1.0], [1.0, 1.0]], [[3e9, 1.0], [-3e9, 1.0]], 0.0), 2.0);
        // What was there before comes last.
        assert_eq!(multiplied([[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]], 16_777_216.0), 16_777_220.0);
        // Denormals count as zeros, before and after.
        assert_eq!(multiplied([[1e-39, 0.0], [0.0, 0.0]], [[1e30, 0.0], [0.0, 0.0]], 0.0), 0.0);
        assert_eq!(multiplied([[1e-20, 0.0], [0.0, 0.0]], [[1e-20, 0.0], [0.0, 0.0]], 1e-39), 0.0);
    }
}
