//! What transformers over tokens are made of: two streams, the picture's and the prompt's, that see each other.

use super::Counter;

/// Numbers that a timestep or a guidance scale is spread out to.
pub const TIMESTEP: u64 = 256;

impl Counter {
    /// A vector of each row, of `inputs` numbers, in two layers.
    pub fn embedding(&mut self, inputs: u64, width: u64) {
        self.linear(self.rows, inputs, width);
        self.linear(self.rows, width, width);
    }

    /// What a row's vector makes of itself for a norm: so many times `width` numbers.
    pub fn modulation(&mut self, width: u64, times: u64) {
        self.linear(self.rows, width, times * width);
    }

    /// `count` layers as wide as their `tokens` of each row.
    pub fn projections(&mut self, tokens: u64, width: u64, count: u64) {
        for _ in 0..count {
            self.linear(self.rows * tokens, width, width);
        }
    }

    /// Two layers, between them four times the width.
    pub fn feed_forward(&mut self, tokens: u64, width: u64) {
        self.linear(self.rows * tokens, width, 4 * width);
        self.linear(self.rows * tokens, 4 * width, width);
    }
}
