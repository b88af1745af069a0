//! Latents as tokens: squares of neighbouring values.

/// What a token's values are, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// A channel's square after the other's, as a convolution reads them.
    ChannelsFirst,
    /// All channels of a place, then those of the next one.
    ChannelsLast,
}

/// (rows, channels, height, width) values → (rows, patches, channels · patch²).
pub(super) fn into_patches(values: &[f32], dims: [usize; 4], patch: usize, order: Order) -> Vec<f32> {
    let mut patches = vec![0.0; values.len()];
    places(dims, patch, order, |of_map, of_patches| patches[of_patches] = values[of_map]);
    patches
}

/// The way back.
pub(super) fn from_patches(patches: &[f32], dims: [usize; 4], patch: usize, order: Order) -> Vec<f32> {
    let mut values = vec![0.0; patches.len()];
    places(dims, patch, order, |of_map, of_patches| values[of_map] = patches[of_patches]);
    values
}

/// Calls `each` with every value's place among (rows, channels, height, width), and among patches.
fn places(dims: [usize; 4], patch: usize, order: Order, mut each: impl FnMut(usize, usize)) {
    let [rows, channels, height, width] = dims;
    let (across, size) = (width / patch, channels * patch * patch);
    for line in 0..rows * channels * height {
        let (row, channel, y) = (line / (channels * height), line / height % channels, line % height);
        for x in 0..width {
            let token = (row * (height / patch) + y / patch) * across + x / patch;
            let within = y % patch * patch + x % patch;
            let place = match order {
                Order::ChannelsFirst => channel * patch * patch + within,
                Order::ChannelsLast => within * channels + channel,
            };
            each(line * width + x, token * size + place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_holds_a_square_of_every_channel() {
        // Two channels of 2 × 4: tens are channels, ones places.
        let values: Vec<f32> = (0..8).chain(10..18).map(|value| value as f32).collect();
        let first = into_patches(&values, [1, 2, 2, 4], 2, Order::ChannelsFirst);
        assert_eq!(first, [0., 1., 4., 5., 10., 11., 14., 15., 2., 3., 6., 7., 12., 13., 16., 17.]);
        let last = into_patches(&values, [1, 2, 2, 4], 2, Order::ChannelsLast);
        assert_eq!(last, [0., 10., 1., 11., 4., 14., 5., 15., 2., 12., 3., 13., 6., 16., 7., 17.]);
    }

    #[test]
    fn the_way_back_is_the_inverse() {
        for (dims, patch) in [([2, 3, 4, 6], 2), ([3, 2, 5, 7], 1), ([1, 1, 6, 3], 3)] {
            let values: Vec<f32> = (0..dims.iter().product()).map(|value: usize| value as f32).collect();
            for order in [Order::ChannelsFirst, Order::ChannelsLast] {
                let patches = into_patches(&values, dims, patch, order);
                assert_eq!(from_patches(&patches, dims, patch, order), values);
                let row = dims[1..].iter().product();
                let alone = into_patches(&values[..row], [1, dims[1], dims[2], dims[3]], patch, order);
                assert_eq!(alone, patches[..row]);
            }
        }
    }
}
