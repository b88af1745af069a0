//! Where tensors live and in which number format.

mod memory;

use std::fmt;
use std::str::FromStr;

use candle_core::DType;

use crate::ops::Place;
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
        let built = [
            (candle_core::utils::cuda_is_available(), Self::Cuda(0)),
            (candle_core::utils::metal_is_available(), Self::Metal),
        ];
        for (_, choice) in built.into_iter().filter(|(built, _)| *built) {
            match Device::open(choice) {
                Ok(_) => return choice,
                Err(error) => tracing::warn!("this build can use {choice}, but it does not open: {error}"),
            }
        }
        Self::Cpu
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
    /// Whether the processor's own kernels compute.
    host: bool,
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
            DeviceChoice::Cuda(ordinal) => open_cuda(ordinal)?,
            DeviceChoice::Metal => candle_core::Device::new_metal(0)?,
        };
        Ok(Self { choice, inner, host: choice == DeviceChoice::Cpu })
    }

    /// The processor as if it were another device: candle's kernels compute, as on a GPU, instead of ours. Slow, and
    /// only `f32`: made for tests of that path on a machine without a GPU.
    pub fn elsewhere() -> Self {
        Self { choice: DeviceChoice::Cpu, inner: candle_core::Device::Cpu, host: false }
    }

    /// What was opened, for logs and bench tables: `cpu (2 threads)`, `cuda:0`, `metal`.
    pub fn describe(&self) -> String {
        match self.choice {
            DeviceChoice::Cpu if !self.host => "cpu (as another device)".to_owned(),
            DeviceChoice::Cpu => format!("cpu ({} threads)", rayon::current_num_threads()),
            choice => choice.to_string(),
        }
    }

    /// Whether it is the processor with kernels of its own.
    pub fn is_processor(&self) -> bool {
        self.host
    }

    /// Runs `work` where operations on this device start fastest: on the processor inside its thread
    /// pool, so that an operation's first tile needs no other thread to wake up.
    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        if self.host { rayon::scope(|_| work()) } else { work() }
    }

    /// In how many parts the rows of a pass are best computed side by side, by a model with so many bytes of
    /// weights. The processor's threads share each operation of a large model, whose weights are then read
    /// once for all of them. Those of a small one stay in caches, but its operations are over before other
    /// threads have woken up: there each thread takes rows of its own through the whole model.
    pub(crate) fn parts(&self, weight_bytes: usize) -> usize {
        const SMALL: usize = 64 << 20;
        if self.host && weight_bytes <= SMALL { rayon::current_num_threads() } else { 1 }
    }

    /// Bytes that a model's activations may well take. On the processor half of what is free now; elsewhere a
    /// fixed number, because there it may show in a picture.
    pub(crate) fn activation_bytes(&self) -> usize {
        const ELSEWHERE: usize = 4 << 30;
        if self.host { memory::free().map_or(ELSEWHERE, |bytes| bytes / 2) } else { ELSEWHERE }
    }

    /// Where tensors are that are computed in `precision`.
    pub(crate) fn place(&self, precision: Precision) -> Place {
        let place = Place::new(&self.inner, precision.dtype());
        if self.host { place } else { place.elsewhere() }
    }

    /// Waits until all is done that was asked of the device: a GPU is given work ahead of time.
    ///
    /// # Errors
    /// [`Error::Device`] if some of it failed.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.inner.synchronize()?)
    }
}

/// One stream for all threads: work of two threads must stay ordered.
fn open_cuda(ordinal: usize) -> Result<candle_core::Device> {
    let device = candle_core::Device::new_cuda_with_stream(ordinal)?;
    #[cfg(feature = "cuda")]
    // SAFETY: every tensor of this device is made, used and freed on its one stream, in that order: no stream has to
    // wait for another, and the events that would see to it are calls of the driver at each use of each tensor.
    #[allow(unsafe_code)]
    unsafe {
        device.as_cuda_device()?.disable_event_tracking();
    }
    Ok(device)
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
    /// What runs best on `device`: 32 bits on a processor, 16 on a GPU, where they have the range of 32 bits if it
    /// can compute with such.
    pub fn default_for(device: &Device) -> Self {
        match device.choice {
            DeviceChoice::Cpu => Self::F32,
            DeviceChoice::Cuda(_) if device.place(Self::Bf16).works() => Self::Bf16,
            DeviceChoice::Cuda(_) | DeviceChoice::Metal => Self::F16,
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
