//! Paths of objects. They come back from the store, so both implementations check them: a path never leaves
//! its folder or bucket, whoever wrote it.

use super::{ArtifactError, Result};

/// Bytes of a path. S3 allows 1,024 with the bucket's prefix.
const MAX_BYTES: usize = 900;

/// Checks an object's path: names between single slashes, none of them empty or beginning with a
/// dot, without NUL, control characters and backslashes.
pub(super) fn check(path: &str) -> Result<&str> {
    if path.is_empty() {
        return Err(refuse(path, "it is empty"));
    }
    check_names(path, path.split('/'))?;
    Ok(path)
}

/// Checks the start of a path, which may be empty and may end anywhere.
pub(super) fn check_prefix(prefix: &str) -> Result<&str> {
    let names = match prefix.rsplit_once('/') {
        Some((folder, "")) => folder,
        _ => prefix,
    };
    if !prefix.is_empty() {
        check_names(prefix, names.split('/'))?;
    }
    Ok(prefix)
}

fn check_names<'a>(path: &str, mut names: impl Iterator<Item = &'a str>) -> Result<()> {
    if path.len() > MAX_BYTES {
        return Err(refuse(path, &format!("it has {} bytes, more than {MAX_BYTES}", path.len())));
    }
    if path.contains(|c: char| c.is_control() || c == '\\') {
        return Err(refuse(path, "it has a control character or a backslash"));
    }
    if names.any(|name| name.is_empty() || name.starts_with('.')) {
        return Err(refuse(path, "one of its names is empty or begins with a dot"));
    }
    Ok(())
}

fn refuse(path: &str, reason: &str) -> ArtifactError {
    let shown: String = path.chars().take(120).collect();
    ArtifactError::Internal(format!("{shown:?} is not the path of an object: {reason}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_could_leave_the_folder_are_refused() {
        for path in ["", "/etc/passwd", "..", "a/../b", "../a", "a/..", "a//b", "a/", "./a", "a/.hidden", "a\\..\\b"] {
            assert!(check(path).is_err(), "{path:?}");
        }
        for path in ["a\0b", "a\nb", &"x".repeat(MAX_BYTES + 1)] {
            assert!(check(path).is_err(), "{path:?}");
        }
    }

    #[test]
    fn ordinary_paths_are_accepted() {
        for path in ["a", "a/b.png", "submissions/0199/images/1.2.png", "größe/x y+z%20.png", "a..b/c"] {
            assert!(check(path).is_ok(), "{path:?}");
        }
    }

    #[test]
    fn a_prefix_may_be_empty_or_end_anywhere_but_not_climb() {
        for prefix in ["", "a", "a/", "a/b", "a/b/"] {
            assert!(check_prefix(prefix).is_ok(), "{prefix:?}");
        }
        for prefix in ["/", "/a", "../", "a/../", "a/..", "a//", ".staging/"] {
            assert!(check_prefix(prefix).is_err(), "{prefix:?}");
        }
    }
}
