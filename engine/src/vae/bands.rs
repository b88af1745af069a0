//! Big pictures in less memory, and yet the same pictures.
//!
//! What makes a VAE's memory are the maps of its outer levels, and what forbids to cut them into tiles are the
//! norms: a group's mean and deviation are those of the whole map, and a tile that takes its own instead differs
//! visibly from its neighbours. So a map that would be too large lies in bands of whole lines, and each residual
//! block walks over it three times: for what its first norm sees, for what its second norm sees, and for the
//! result. Its first convolution is computed twice by that; nothing is blended and nothing is estimated.
//!
//! On the processor the result is bit for bit that of the whole map, so that the memory at hand may decide. For
//! that, bands are cut where the norms' sums are, and a band is computed with as many lines around it as the
//! tiles of minimal filtering reach.

use std::ops::Range;

use crate::Result;
use crate::denoiser::ResnetBlock;
use crate::ops::{self, Conv2d, GroupNorm, Seen, Tensor, UpsampleConv};

/// Lines beside a band that one convolution needs around it. One would do for its windows; four are a whole tile
/// of minimal filtering, which keeps tiles where they are in the whole map.
const AROUND: usize = 4;

/// How a map is cut into bands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    height: usize,
    width: usize,
    band: usize,
}

impl Cut {
    /// Bands of a map whose line takes so many bytes with all that is computed from it, each band with what lies
    /// around it within `budget` as far as that can be.
    pub fn new((height, width): (usize, usize), line_bytes: usize, budget: usize) -> Self {
        let unit = least_common_multiple(Seen::unit(height, width), AROUND);
        // Below that, what lies around a band costs more than the band.
        let least = (4 * AROUND).next_multiple_of(unit);
        let fitting = (budget / line_bytes.max(1)).saturating_sub(4 * AROUND) / unit * unit;
        // Of a narrow map, what remains for the last band could be too little for minimal filtering.
        let band = if width < 4 * AROUND { height } else { fitting.max(least) };
        Self { height, width, band: band.clamp(1, height.max(1)) }
    }

    fn bands(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let Self { height, band, .. } = *self;
        (0..height).step_by(band).map(move |top| top..height.min(top + band))
    }

    /// A band with so many lines around it, as far as the map goes.
    fn around(&self, band: &Range<usize>, lines: usize) -> Range<usize> {
        band.start.saturating_sub(lines)..self.height.min(band.end + lines)
    }
}

/// A map of one row in bands.
pub(super) struct Bands {
    /// Where each begins, and its lines; `None` once nobody needs it any more.
    bands: Vec<(usize, Option<Tensor>)>,
    height: usize,
}

impl Bands {
    /// A whole map as one band.
    pub fn of(map: Tensor) -> Result<Self> {
        let height = map.dims4()?.1;
        Ok(Self { bands: vec![(0, Some(map))], height })
    }

    fn empty() -> Self {
        Self { bands: Vec::new(), height: 0 }
    }

    fn push(&mut self, band: Tensor) -> Result<()> {
        let lines = band.dims4()?.1;
        self.bands.push((self.height, Some(band)));
        self.height += lines;
        Ok(())
    }

    fn lines(&self, range: Range<usize>) -> Result<Tensor> {
        let mut parts = Vec::new();
        for (top, band) in &self.bands {
            let Some(band) = band else { continue };
            let (start, end) = (range.start.max(*top), range.end.min(top + band.dims4()?.1));
            if start < end {
                parts.push(ops::lines(band, start - top..end - top)?);
            }
        }
        ops::stack_lines(&parts.iter().collect::<Vec<_>>())
    }

    /// Lets go of the bands that end above `line`.
    fn release_above(&mut self, line: usize) {
        let tops: Vec<usize> = self.bands.iter().map(|(top, _)| *top).chain([self.height]).collect();
        for ((_, band), end) in self.bands.iter_mut().zip(&tops[1..]) {
            if *end <= line {
                *band = None;
            }
        }
    }
}

/// Where the lines of a map come from.
pub(super) enum Source<'a> {
    Stored(Bands),
    /// Computed when asked for, since they take four times the memory.
    Enlarged(&'a UpsampleConv, Bands),
    /// The first convolution over a picture, which takes a multiple of its memory.
    Convolved(&'a Conv2d, Bands),
}

impl<'a> Source<'a> {
    /// A map that is there.
    pub fn of(map: Tensor) -> Result<Self> {
        Ok(Self::Stored(Bands::of(map)?))
    }

    /// The map in one piece.
    pub fn whole(self) -> Result<Tensor> {
        let height = match &self {
            Self::Stored(bands) | Self::Convolved(_, bands) => bands.height,
            Self::Enlarged(_, bands) => 2 * bands.height,
        };
        self.lines(0..height)
    }

    /// The map, doubled and convolved.
    pub fn enlarged(self, conv: &'a UpsampleConv) -> Result<Self> {
        match self {
            Self::Stored(bands) => Ok(Self::Enlarged(conv, bands)),
            other => Ok(Self::Enlarged(conv, Bands::of(other.whole()?)?)),
        }
    }

    /// The map, convolved.
    pub fn convolved(self, conv: &'a Conv2d) -> Result<Self> {
        match self {
            Self::Stored(bands) => Ok(Self::Convolved(conv, bands)),
            other => Ok(Self::Convolved(conv, Bands::of(other.whole()?)?)),
        }
    }

    fn lines(&self, range: Range<usize>) -> Result<Tensor> {
        match self {
            Self::Stored(bands) => bands.lines(range),
            Self::Enlarged(conv, bands) => {
                let around = AROUND / 2;
                let small = (range.start / 2).saturating_sub(around)..bands.height.min(range.end.div_ceil(2) + around);
                let from = bands.lines(small.clone())?;
                let (_, height, width, _) = from.dims4()?;
                let large = conv.forward(&from, 2 * height, 2 * width)?;
                ops::lines(&large, range.start - 2 * small.start..range.end - 2 * small.start)
            }
            Self::Convolved(conv, bands) => {
                let wide = range.start.saturating_sub(AROUND)..bands.height.min(range.end + AROUND);
                within(&conv.forward(&bands.lines(wide.clone())?)?, &wide, &range)
            }
        }
    }

    /// Lets go of what lines from `line` on do not need.
    fn release_above(&mut self, line: usize) {
        match self {
            Self::Stored(bands) => bands.release_above(line),
            Self::Enlarged(_, bands) => bands.release_above((line / 2).saturating_sub(AROUND / 2)),
            Self::Convolved(_, bands) => bands.release_above(line.saturating_sub(AROUND)),
        }
    }
}

/// Lines `inner` of a tensor that holds the lines `outer`.
fn within(x: &Tensor, outer: &Range<usize>, inner: &Range<usize>) -> Result<Tensor> {
    ops::lines(x, inner.start - outer.start..inner.end - outer.start)
}

/// What a norm sees of a map whose bands `lines` gives.
fn look(cut: Cut, mut lines: impl FnMut(Range<usize>) -> Result<Tensor>) -> Result<Seen> {
    let mut seen = None;
    for band in cut.bands() {
        let band = lines(band)?;
        let (rows, _, _, channels) = band.dims4()?;
        let seen = seen.get_or_insert_with(|| Seen::nothing([rows, cut.height, cut.width, channels]));
        seen.look(&band)?;
    }
    Ok(seen.unwrap_or_else(|| Seen::nothing([0, 0, 0, 0])))
}

/// A residual block over a map in bands. Its input's bands go as its output's come.
pub(super) fn resnet<'a>(block: &ResnetBlock, mut source: Source<'a>, cut: Cut) -> Result<Source<'a>> {
    let first = look(cut, |band| source.lines(band))?;
    let second = look(cut, |band| {
        let outer = cut.around(&band, AROUND);
        within(&block.first_half(&source.lines(outer.clone())?, &first)?, &outer, &band)
    })?;
    let mut output = Bands::empty();
    for band in cut.bands() {
        let middle = cut.around(&band, AROUND);
        let outer = cut.around(&band, 2 * AROUND);
        let x = source.lines(outer.clone())?;
        let hidden = within(&block.first_half(&x, &first)?, &outer, &middle)?;
        let result = block.second_half(&hidden, &within(&x, &outer, &middle)?, &second)?;
        output.push(within(&result, &middle, &band)?)?;
        source.release_above(band.end.saturating_sub(2 * AROUND));
    }
    Ok(Source::Stored(output))
}

/// Norm, SiLU and a convolution over a map in bands.
pub(super) fn finish(norm: &GroupNorm, conv: &Conv2d, mut source: Source<'_>, cut: Cut) -> Result<Tensor> {
    let seen = look(cut, |band| source.lines(band))?;
    let mut output = Bands::empty();
    for band in cut.bands() {
        let outer = cut.around(&band, AROUND);
        let result = conv.forward(&norm.forward_silu_seen(&source.lines(outer.clone())?, &seen)?)?;
        output.push(within(&result, &outer, &band)?)?;
        source.release_above(band.end.saturating_sub(AROUND));
    }
    Source::Stored(output).whole()
}

/// A convolution that halves a map in bands; without padding but for a last line and column.
pub(super) fn halve<'a>(conv: &Conv2d, mut source: Source<'a>, cut: Cut) -> Result<Source<'a>> {
    let mut output = Bands::empty();
    for band in cut.bands() {
        // A line more, where there is one: the window of the last output reaches it.
        let x = source.lines(band.start..cut.height.min(band.end + 2))?;
        let halved = conv.forward(&x)?;
        let lines = band.end.div_ceil(2) - band.start / 2;
        output.push(ops::lines(&halved, 0..lines.min(halved.dims4()?.1))?)?;
        source.release_above(band.end);
    }
    Ok(Source::Stored(output))
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a.max(1), b.max(1));
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a.max(1) / x * b.max(1)
}
