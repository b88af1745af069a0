//! What networks over feature maps, U-Nets and VAEs, are made of.

use super::Counter;

/// Tokens of a prompt.
const TOKENS: u64 = 77;

impl Counter {
    /// Two convolutions, and what else the sizes ask for.
    pub fn residual_block(&mut self, inputs: u64, outputs: u64, time: Option<u64>) {
        self.convolution(inputs, outputs, 3);
        if let Some(width) = time {
            self.linear(self.rows, width, outputs);
        }
        self.convolution(outputs, outputs, 3);
        if inputs != outputs {
            self.convolution(inputs, outputs, 1);
        }
    }

    /// Layers that look at the map and at the prompt, between two projections.
    pub fn transformer(&mut self, channels: u64, context: u64, layers: u64) {
        let (tokens, pixels) = (self.side.0 * self.side.1, self.pixels());
        self.linear(pixels, channels, channels);
        for _ in 0..layers {
            self.attention_layer(channels, channels, tokens);
            self.attention_layer(channels, context, TOKENS);
            self.linear(pixels, channels, 8 * channels);
            // Half of those gate the other half.
            self.linear(pixels, 4 * channels, channels);
        }
        self.linear(pixels, channels, channels);
    }

    /// Projections, products and the way back; keys and values come from `keys` tokens of `context` channels.
    pub fn attention_layer(&mut self, channels: u64, context: u64, keys: u64) {
        let (tokens, pixels) = (self.side.0 * self.side.1, self.pixels());
        self.linear(pixels, channels, channels);
        self.linear(self.rows * keys, context, channels);
        self.linear(self.rows * keys, context, channels);
        self.attention(tokens, keys, channels);
        self.linear(pixels, channels, channels);
    }

    /// A convolution of stride 2.
    pub fn downsample(&mut self, channels: u64) {
        let before = self.pixels();
        self.side = (self.side.0.div_ceil(2), self.side.1.div_ceil(2));
        self.convolution_from(before, channels, channels, 3);
    }

    /// To sides twice as long, then a convolution; the longer map need not exist.
    pub fn upsample(&mut self, channels: u64) {
        let before = self.pixels();
        self.side = (2 * self.side.0, 2 * self.side.1);
        self.convolution_from(before, channels, channels, 3);
    }
}
