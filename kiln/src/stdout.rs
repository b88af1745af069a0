//! Standard output, where a reader that has seen enough (`| head`) is no error worth a message.

use std::fmt::Display;
use std::io::{self, Write};

use anyhow::Result;

/// Prints a line.
pub fn line(text: impl Display) -> Result<()> {
    writeln!(io::stdout(), "{text}")?;
    Ok(())
}

/// Prints text that ends its lines itself.
pub fn text(text: impl Display) -> Result<()> {
    write!(io::stdout(), "{text}")?;
    Ok(io::stdout().flush()?)
}

/// True if the command failed only because nobody reads its output any more.
pub fn has_lost_its_reader(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
