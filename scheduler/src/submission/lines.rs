//! Cuts a body into lines as it arrives.

use farm::spec::ValidationError;

use crate::refusal::refuse;

/// Holds what has arrived of the current line, never more than one line.
#[derive(Debug)]
pub(crate) struct LineSplitter {
    partial: Vec<u8>,
    line: u64,
    limit: usize,
}

impl LineSplitter {
    /// A splitter for lines of at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self { partial: Vec::new(), line: 1, limit }
    }

    /// The number of the line that is being read, from 1.
    pub(crate) fn line(&self) -> u64 {
        self.line
    }

    /// Takes the next piece of the body and hands each line that it completes to `each`, with its number.
    /// Blank lines count, but are not handed on.
    pub(crate) fn push<E: From<ValidationError>>(
        &mut self,
        mut piece: &[u8],
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(end) = piece.iter().position(|byte| *byte == b'\n') {
            let (line, rest) = piece.split_at(end);
            piece = &rest[1..];
            self.check(line.len())?;
            if self.partial.is_empty() {
                hand_on(self.line, line, &mut each)?;
            } else {
                self.partial.extend_from_slice(line);
                let whole = std::mem::take(&mut self.partial);
                hand_on(self.line, &whole, &mut each)?;
            }
            self.line += 1;
        }
        self.check(piece.len())?;
        self.partial.extend_from_slice(piece);
        Ok(())
    }

    /// The body has ended: the last line need not end in a line break.
    pub(crate) fn finish<E>(self, mut each: impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        hand_on(self.line, &self.partial, &mut each)
    }

    fn check(&self, more: usize) -> Result<(), ValidationError> {
        let bytes = self.partial.len() + more;
        if bytes > self.limit {
            return Err(refuse(
                "body",
                format!("lines of at most {} bytes", self.limit),
                format!("{bytes} bytes and more"),
            ));
        }
        Ok(())
    }
}

fn hand_on<E>(number: u64, line: &[u8], each: &mut impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
    match line.trim_ascii() {
        [] => Ok(()),
        line => each(number, line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(body: &[u8], piece: usize, limit: usize) -> Result<Vec<(u64, String)>, ValidationError> {
        let mut lines = Vec::new();
        let mut keep = |number: u64, line: &[u8]| {
            lines.push((number, String::from_utf8(line.to_vec()).unwrap()));
            Ok::<(), ValidationError>(())
        };
        let mut splitter = LineSplitter::new(limit);
        for piece in body.chunks(piece) {
            splitter.push(piece, &mut keep)?;
        }
        splitter.finish(&mut keep)?;
        Ok(lines)
    }

    #[test]
    fn lines_come_out_whole_however_the_body_is_cut() {
        let body = b"one\r\n\n  two\t\n\nthree";
        let expected = vec![(1, "one".to_owned()), (3, "two".to_owned()), (5, "three".to_owned())];
        for piece in 1..=body.len() {
            assert_eq!(split(body, piece, 100).unwrap(), expected, "pieces of {piece}");
        }
    }

    #[test]
    fn a_body_of_nothing_but_blanks_has_no_lines() {
        assert_eq!(split(b"\n \r\n\n", 2, 10).unwrap(), []);
        assert_eq!(split(b"", 1, 10).unwrap(), []);
    }

    #[test]
    fn a_line_beyond_the_limit_is_refused_before_it_is_whole() {
        assert_eq!(split(b"12345\n12345\n", 3, 5).unwrap().len(), 2);
        for piece in 1..=12 {
            let refusal = split(b"12345\n123456", piece, 5).expect_err("the second line is too long");
            assert_eq!(refusal.limit, "lines of at most 5 bytes");
        }
    }
}
