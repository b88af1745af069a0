//! `kiln key`: a new API key. The scheduler only ever knows its hash.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::cli::KeyArgs;
use crate::stdout;

/// Makes a key and prints how to use it.
pub fn run(args: &KeyArgs) -> Result<ExitCode> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    ensure!(
        !args.name.is_empty() && args.name.chars().all(plain),
        "the name must be letters, digits, `-` and `_`, but is `{}`",
        args.name
    );
    let key = make();
    stdout::line(format_args!("{key}"))?;
    eprintln!();
    eprintln!("Give that key to {}: `export KILN_API_KEY=…`, or `--api-key …`. It is stored nowhere.", args.name);
    eprintln!("Let it in with this in the scheduler's configuration:");
    eprintln!();
    eprintln!("[api.key_hashes]");
    eprintln!("{} = \"{}\"", args.name, hash(&key));
    Ok(ExitCode::SUCCESS)
}

/// 244 random bits of the system's generator, in hex behind a prefix that secret scanners can know.
fn make() -> String {
    format!("kiln_{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple())
}

fn hash(key: &str) -> String {
    Sha256::digest(key.as_bytes()).iter().fold(String::new(), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_long_and_differ() {
        let (one, two) = (make(), make());
        assert_eq!(one.len(), 5 + 64);
        assert_ne!(one, two);
    }

    #[test]
    fn the_hash_is_sha_256_in_hex() {
        assert_eq!(hash("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
