//! Where tensors live and in which number format.

mod memory;

use std::fmt;
use std::str::FromStr;

use candle_core::DType;

use crate::{Error, Result};

/// Which device to open, as a flag or configuration names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceChoice {
    /// The processor.
    Cpu,
    /// An NVIDIA GPU by its ordinal.
    Cuda(usize),
    /// The first Apple GPU.
    Metal,
}

impl DeviceChoice {
    /// The fastest kind of device that this build can drive and this machine has.
    pub fn best() -> Self {
        if candle_core::utils::cuda_is_available() && Device::open(Self::Cuda(0)).is_ok() {
            Self::Cuda(0)
        } else if candle_core::utils::metal_is_available() && Device::open(Self::Metal).is_ok() {
            Self::Metal
        } else {
            Self::Cpu
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let refuse = || Error::request("device", "`cpu`, `cuda`, `cuda:N` or `metal`", format!("`{word}`"));
        match word {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            _ => {
                let ordinal = word.strip_prefix("cuda:").ok_or_else(refuse)?;
                ordinal.parse().map(Self::Cuda).map_err(|_| refuse())
            }
        }
    }
}

/// An open device. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Device {
    choice: DeviceChoice,
    inner: candle_core::Device,
}

impl Device {
    /// Opens a device.
    ///
    /// # Errors
    /// [`Error::Request`] if this build has no support for it, [`Error::Device`] if it cannot be
    /// opened.
    pub fn open(choice: DeviceChoice) -> Result<Self> {
        let inner = match choice {
            DeviceChoice::Cpu => candle_core::Device::Cpu,
            DeviceChoice::Cuda(_) if !candle_core::utils::cuda_is_available() => {
                return Err(Error::request("device", "one that this build supports (feature `cuda` is off)", choice));
            }
            DeviceChoice::Metal if !candle_core::utils::metal_is_available() => {
                return Err(Error::request("device", "one that this build supports (feature `metal` is off)", choice));
            }
            // One stream for all threads: work of two threads must stay ordered.
            DeviceChoice::Cuda(ordinal) => candle_core::Device::new_cuda_with_stream(ordinal)?,
            DeviceChoice::Metal => candle_core::Device::new_metal(0)?,
        };
        Ok(Self { choice, inner })
    }

    /// What was opened, for logs and bench tables: `cpu (2 threads)`, `cuda:0`, `metal`.
    pub fn describe(&self) -> String {
        match self.choice {
            DeviceChoice::Cpu => format!("cpu ({} threads)", rayon::current_num_threads()),
            choice => choice.to_string(),
        }
    }

    /// Runs `work` where operations on this device start fastest: on the processor inside its thread
    /// pool, so that an operation's first tile needs no other thread to wake up.
    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match self.choice {
            DeviceChoice::Cpu => rayon::scope(|_| work()),
            _ => work(),
        }
    }

    /// In how many parts the rows of a pass are best computed side by side, by a model with so many bytes of
    /// weights. The processor's threads share each operation of a large model, whose weights are then read
    /// once for all of them. Those of a small one stay in caches, but its operations are over before other
    /// threads have woken up: there each thread takes rows of its own through the whole model.
    pub(crate) fn parts(&self, weight_bytes: usize) -> usize {
        const SMALL: usize = 64 << 20;
        match self.choice {
            DeviceChoice::Cpu if weight_bytes <= SMALL => rayon::current_num_threads(),
            _ => 1,
        }
    }

    /// Bytes that a model's activations may well take. On the processor half of what is free now; elsewhere a
    /// fixed number, because there it may show in a picture.
    pub(crate) fn activation_bytes(&self) -> usize {
        const ELSEWHERE: usize = 4 << 30;
        match self.choice {
            DeviceChoice::Cpu => memory::free().map_or(ELSEWHERE, |bytes| bytes / 2),
            _ => ELSEWHERE,
        }
    }

    /// The device for tensors.
    pub(crate) fn tensors(&self) -> &candle_core::Device {
        &self.inner
    }
}

/// The number format that the models compute in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// 16-bit floats with the exponent of `f32`.
    Bf16,
}

impl Precision {
    /// What runs best on `device`: 32 bits on a processor, 16 on a GPU.
    pub fn default_for(device: &Device) -> Self {
        match device.choice {
            DeviceChoice::Cpu => Self::F32,
            DeviceChoice::Cuda(_) => Self::Bf16,
            DeviceChoice::Metal => Self::F16,
        }
    }

    /// The word used in flags and metadata.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        match word {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            _ => Err(Error::request("precision", "`f32`, `f16` or `bf16`", format!("`{word}`"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_word_names_its_ordinal() {
        assert_eq!("cpu".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cpu);
        assert_eq!("cuda".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(0));
        assert_eq!("cuda:3".parse::<DeviceChoice>().unwrap(), DeviceChoice::Cuda(3));
        assert_eq!("metal".parse::<DeviceChoice>().unwrap(), DeviceChoice::Metal);
        assert_eq!(DeviceChoice::Cuda(3).to_string(), "cuda:3");
    }

    #[test]
    fn an_unknown_device_or_precision_is_refused_by_name() {
        for word in ["", "gpu", "cuda:", "cuda:x", "cuda:-1"] {
            let error = word.parse::<DeviceChoice>().unwrap_err().to_string();
            assert_eq!(error, format!("`device` must be `cpu`, `cuda`, `cuda:N` or `metal`, but is `{word}`"));
        }
        let error = "f64".parse::<Precision>().unwrap_err().to_string();
        assert_eq!(error, "`precision` must be `f32`, `f16` or `bf16`, but is `f64`");
    }

    #[test]
    fn the_processor_opens_and_prefers_32_bits() {
        let device = Device::open(DeviceChoice::Cpu).unwrap();
        assert!(device.describe().starts_with("cpu ("));
        assert_eq!(Precision::default_for(&device), Precision::F32);
    }
}
