//! How much memory a level of the VAE takes, and whether it is at hand.

use super::bands::Cut;
use super::config::VaeConfig;

/// What activations may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    /// Bytes of a value.
    pub value: usize,
    /// Bytes for a row's activations; beyond, its maps lie in bands.
    pub budget: usize,
}

impl Memory {
    /// How a level of residual blocks is cut on a map of this size; `None`: it fits as a whole. It depends on
    /// nothing but the size and the budget, never on how many rows share the pass.
    pub fn cut(self, (inputs, outputs): (usize, usize), (height, width): (usize, usize)) -> Option<Cut> {
        let line = width.saturating_mul(self.pixel(inputs, outputs));
        (line.saturating_mul(height) > self.budget).then(|| Cut::new((height, width), line, self.budget / 4))
    }

    /// Bytes of a pixel in a residual block: what comes in, what lies between its convolutions, its shortcut
    /// and what goes out.
    fn pixel(self, inputs: usize, outputs: usize) -> usize {
        (inputs + 3 * outputs).saturating_mul(self.value)
    }

    /// The most bytes that any level of a picture takes.
    pub fn of_picture(self, config: &VaeConfig, height: usize, width: usize) -> usize {
        let levels = config.channels.iter().enumerate().map(|(index, channels)| {
            let below = config.channels.get(index + 1).unwrap_or(channels);
            let pixels = (height >> index).saturating_mul(width >> index);
            pixels.saturating_mul(self.pixel(*below, *channels))
        });
        levels.max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_cut_when_its_blocks_would_take_more_than_the_budget() {
        let memory = |budget| Memory { value: 4, budget };
        let needed = 4 * (256 + 3 * 128) * 1024 * 1024;
        assert!(memory(needed).cut((256, 128), (1024, 1024)).is_none());
        assert!(memory(needed - 1).cut((256, 128), (1024, 1024)).is_some());
        assert!(memory(0).cut((usize::MAX / 8, 1), (1 << 20, 1 << 20)).is_some());
    }
}
