//! What can go wrong between a folder of weights and a picture. Policy: a caller branches on the
//! variant; the text names the file, tensor, field, limit and value for the person who reads it.

use std::path::{Path, PathBuf};

use crate::RowId;

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a checkpoint did not load or a row did not advance.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The checkpoint's files are unusable: missing, of another architecture, or with missing, extra
    /// or misshapen tensors. Trying again does not help.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file or folder at fault.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Files that a loaded checkpoint has to read again are not those of its loading any more: gone, or others.
    /// Loading it anew helps.
    #[error("{}: {problem}; its text encoder cannot be read again before the checkpoint is loaded anew", path.display())]
    Changed {
        /// The file or folder.
        path: PathBuf,
        /// What has changed.
        problem: String,
    },
    /// The request cannot be rendered by this checkpoint. Trying again does not help.
    #[error("`{field}` must be {limit}, but is {value}")]
    Request {
        /// The field of the request.
        field: String,
        /// What it must be.
        limit: String,
        /// What it was.
        value: String,
    },
    /// Memory of the device or of the host did not suffice; fewer rows may fit.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// A row's latent or picture is no longer a finite number; the row cannot be rescued.
    #[error("row {row} left the range of finite numbers")]
    NotFinite {
        /// The row.
        row: RowId,
    },
    /// The device failed, or a kernel that this build lacks was asked for.
    #[error("device: {0}")]
    Device(candle_core::Error),
}

impl Error {
    /// A checkpoint error at `path`.
    pub(crate) fn checkpoint(path: impl AsRef<Path>, problem: impl ToString) -> Self {
        Self::Checkpoint { path: path.as_ref().to_owned(), problem: problem.to_string() }
    }

    /// A request error.
    pub(crate) fn request(field: &str, limit: impl ToString, value: impl ToString) -> Self {
        Self::Request { field: field.to_owned(), limit: limit.to_string(), value: value.to_string() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(mut error: candle_core::Error) -> Self {
        // Where a call came from is nothing to show to people, nor to look for words in.
        while let candle_core::Error::WithBacktrace { inner, .. } = error {
            error = *inner;
        }
        // candle wraps a driver's refusal of memory in its text only.
        let text = error.to_string();
        let lower = text.to_lowercase();
        // The driver's, its libraries' (cuBLAS, cuDNN) and Metal's.
        const REFUSALS: [&str; 4] = ["out of memory", "out_of_memory", "alloc_failed", "create metal resource: buffer"];
        if REFUSALS.iter().any(|words| lower.contains(words)) {
            return Self::OutOfMemory(text);
        }
        Self::Device(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_refuses_memory_is_told_from_one_that_fails() {
        for refusal in [
            r#"DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")"#,
            "CublasError(CUBLAS_STATUS_ALLOC_FAILED)",
            "CudnnError(CUDNN_STATUS_ALLOC_FAILED)",
            "Failed to create metal resource: Buffer",
        ] {
            let error = Error::from(candle_core::Error::Msg(refusal.to_owned()));
            assert!(matches!(&error, Error::OutOfMemory(text) if text == refusal), "{error}");
        }
        let failure = candle_core::Error::Msg("CublasError(CUBLAS_STATUS_EXECUTION_FAILED)".to_owned());
        assert!(matches!(Error::from(failure), Error::Device(_)));
    }

    #[test]
    fn an_error_s_text_says_what_and_not_where_from() {
        let inner = Box::new(candle_core::Error::Msg("no such kernel".to_owned()));
        let backtrace = Box::new(std::backtrace::Backtrace::force_capture());
        let error = Error::from(candle_core::Error::WithBacktrace { inner, backtrace });
        assert_eq!(error.to_string(), "device: no such kernel");
    }
}
