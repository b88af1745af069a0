//! Tensors from safetensors and GGUF files, read one at a time, so that a model never lies in memory
//! twice. Whatever a part lacks, has too much of or has in another shape is named in one error.

mod file;
mod files;
mod gguf;
mod layers;
mod origin;
mod original;
mod part;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use self::file::WeightFile;
pub(crate) use self::files::find;
pub(crate) use self::gguf::Entry;
pub(crate) use self::origin::Origin;
pub(crate) use self::original::SingleFile;
pub(crate) use self::part::Part;
use crate::ops::{Parameter, Place, Stored as Format, Tensor};
use crate::{Error, Result};

/// How many names of each kind an error lists.
const NAMES_SHOWN: usize = 8;

/// The tensors of one part of a checkpoint (its text encoder, denoiser or VAE).
pub(crate) struct Weights {
    folder: PathBuf,
    files: Vec<Arc<WeightFile>>,
    stored: HashMap<String, Stored>,
    place: Place,
    seen: RefCell<Seen>,
}

/// A tensor in a file.
#[derive(Clone)]
struct Stored {
    /// Which of the part's files.
    file: usize,
    bytes: Range<usize>,
    /// Its format, or the word for one that cannot be read.
    format: Result<Format, String>,
    /// As it is read, whatever the order of its bytes.
    shape: Vec<usize>,
    order: Order,
}

/// How the bytes of a tensor lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Plain,
    /// The second half of its rows first.
    HalvesSwapped,
    /// Columns first.
    Transposed,
    /// There are none: it is the identity.
    Identity,
}

/// What the model's construction has asked for so far.
#[derive(Default)]
struct Seen {
    used: BTreeSet<String>,
    missing: Vec<String>,
    misshapen: Vec<String>,
}

impl Weights {
    /// Opens the part's files: `stem.safetensors`, a sharded index, a variant of them, or one GGUF file, whose
    /// tensors may be named as their makers did. Layers built from it live at `place`.
    pub fn open(folder: &Path, stem: &str, place: &Place) -> Result<Self> {
        let paths = find(folder, stem)?;
        if let [path] = paths.as_slice()
            && files::is_gguf(path)
            && let Some(weights) = SingleFile::only_part(path, place)?
        {
            return Ok(weights);
        }
        let mut weights = Self {
            folder: folder.to_owned(),
            files: Vec::new(),
            stored: HashMap::new(),
            place: place.clone(),
            seen: RefCell::default(),
        };
        for path in paths {
            weights.add(&path)?;
        }
        Ok(weights)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let refuse = |problem: String| Error::checkpoint(path, problem);
        let file = WeightFile::open(path)?;
        file.read_ahead(0..file.len());
        for Entry { name, format, shape, bytes } in entries(&file)? {
            let stored = Stored { file: self.files.len(), bytes, format, shape, order: Order::Plain };
            if let Some(twice) = self.stored.insert(name.clone(), stored) {
                let other =
                    if twice.file == self.files.len() { "there twice" } else { "also in another file of this part" };
                return Err(refuse(format!("tensor `{name}` is {other}")));
            }
        }
        self.files.push(file);
        Ok(())
    }

    /// The tensors of a part within a file, under our names.
    fn of(path: PathBuf, file: Arc<WeightFile>, stored: HashMap<String, Stored>, place: &Place) -> Self {
        Self { folder: path, files: vec![file], stored, place: place.clone(), seen: RefCell::default() }
    }

    /// The scope without a prefix.
    pub fn root(&self) -> Scope<'_> {
        Scope { weights: self, prefix: String::new() }
    }

    /// Whether there is a tensor of this full name.
    pub fn contains(&self, name: &str) -> bool {
        self.stored.contains_key(name)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> usize {
        self.stored.values().map(|stored| stored.bytes.len()).sum()
    }

    /// Ends the construction: an error naming every tensor that was missing or misshapen, or that
    /// nothing asked for and `ignored` does not know.
    pub fn finish(self, ignored: impl Fn(&str) -> bool) -> Result<()> {
        let seen = self.seen.borrow();
        let mut extra: Vec<String> =
            self.stored.keys().filter(|name| !seen.used.contains(*name) && !ignored(name)).cloned().collect();
        extra.sort();
        self.problems(&seen, &extra).map_or(Ok(()), Err)
    }

    fn problems(&self, seen: &Seen, extra: &[String]) -> Option<Error> {
        let listed = |what: &str, names: &[String]| {
            let shown = names.iter().take(NAMES_SHOWN).cloned().collect::<Vec<_>>().join(", ");
            let more = if names.len() > NAMES_SHOWN {
                format!(" and {} more", names.len() - NAMES_SHOWN)
            } else {
                String::new()
            };
            (!names.is_empty()).then(|| format!("{what}: {shown}{more}"))
        };
        let problems: Vec<String> = [
            listed("missing tensors", &seen.missing),
            listed("tensors of another shape than config.json says", &seen.misshapen),
            listed("tensors that this model does not have", extra),
        ]
        .into_iter()
        .flatten()
        .collect();
        (!problems.is_empty()).then(|| Error::checkpoint(&self.folder, problems.join("; ")))
    }

    /// Finds a tensor. What is missing or misshapen is noted and answered with zeros, so that one error
    /// can name all of it.
    fn read(&self, name: &str, shape: &[usize]) -> Result<Parameter<'_>> {
        let mut seen = self.seen.borrow_mut();
        match self.stored.get(name) {
            None => seen.missing.push(name.to_owned()),
            Some(stored) => {
                seen.used.insert(name.to_owned());
                if trimmed(&stored.shape) == trimmed(shape) {
                    return self.parameter(name, stored, shape);
                }
                seen.misshapen.push(format!("{name} {:?} instead of {shape:?}", stored.shape));
            }
        }
        // Do not spend more memory on a stand-in than the files are large.
        let total: usize = self.files.iter().map(|file| file.len()).sum();
        let values = shape.iter().product::<usize>();
        if values > total {
            return Err(self.problems(&seen, &[]).unwrap_or_else(|| Error::checkpoint(&self.folder, name)));
        }
        Ok(Parameter::from_values(&vec![0.0; values], shape))
    }

    fn parameter(&self, name: &str, stored: &Stored, shape: &[usize]) -> Result<Parameter<'_>> {
        let (file, range) = (&*self.files[stored.file], stored.bytes.clone());
        match (&stored.format, stored.order) {
            (Ok(format), Order::Plain) => Ok(Parameter::within(file, range, *format, shape)),
            (Ok(format), Order::HalvesSwapped) => {
                let mut bytes = file.bytes(range)?;
                let half = bytes.len() / 2;
                bytes.rotate_left(half);
                Ok(Parameter::new(bytes, *format, shape))
            }
            (Ok(format), Order::Transposed) => {
                Ok(Parameter::new(transposed(&file.bytes(range)?, format.block().1, shape), *format, shape))
            }
            (Ok(_), Order::Identity) => {
                let side = shape[0];
                let value = |index: usize| if index / side == index % side { 1.0 } else { 0.0 };
                Ok(Parameter::from_values(&(0..side * side).map(value).collect::<Vec<f32>>(), shape))
            }
            (Err(word), _) => {
                let readable = "f32, f16, bf16, f64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K or Q6_K";
                let problem = format!("tensor `{name}` has format {word}; {readable} can be read");
                Err(Error::checkpoint(&self.folder, problem))
            }
        }
    }
}

/// What tensors come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Container {
    Safetensors,
    Gguf,
}

/// What a file's header says: its container, its length and its tensors.
pub(crate) fn read_header(path: &Path) -> Result<(Container, usize, Vec<Entry>)> {
    let file = WeightFile::open(path)?;
    Ok((container(&file)?, file.len(), entries(&file)?))
}

fn container(file: &WeightFile) -> Result<Container> {
    let start = file.bytes(0..file.len().min(gguf::MAGIC.len()))?;
    Ok(if start == gguf::MAGIC { Container::Gguf } else { Container::Safetensors })
}

/// The tensors of a file, whichever container it is.
fn entries(file: &WeightFile) -> Result<Vec<Entry>> {
    match container(file)? {
        Container::Gguf => {
            gguf::read(file.stream(), file.len()).map_err(|problem| Error::checkpoint(file.path(), problem))
        }
        Container::Safetensors => read_safetensors(file),
    }
}

/// About how many bytes a tensor takes at `place`: on the processor, matrices stay in the blocks that they come in.
fn bytes_at(place: &Place, format: &Result<Format, String>, shape: &[usize], stored: usize) -> usize {
    match format {
        Ok(Format::Quantised(_)) if shape.len() == 2 && place.keeps_blocks() => stored,
        _ => shape.iter().product::<usize>().saturating_mul(place.value_bytes()),
    }
}

/// A matrix of `shape` from one whose columns are stored as rows, each value `each` bytes.
fn transposed(bytes: &[u8], each: usize, shape: &[usize]) -> Vec<u8> {
    let (rows, columns) = (shape[0], shape[1]);
    let mut values = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        for column in 0..columns {
            let at = (column * rows + row) * each;
            values.extend_from_slice(&bytes[at..at + each]);
        }
    }
    values
}

/// The tensors of a safetensors file: the length of its header, the header, then the tensors' bytes up to its end.
fn read_safetensors(file: &WeightFile) -> Result<Vec<Entry>> {
    /// The longest header that the format's own library reads.
    const LONGEST: usize = 100_000_000;
    const COUNT: usize = size_of::<u64>();
    let len = file.len();
    let refuse = |problem: String| {
        Error::checkpoint(file.path(), format!("is not a complete safetensors file of {len} bytes: {problem}"))
    };
    let Ok(count) = <[u8; COUNT]>::try_from(file.bytes(0..COUNT.min(len))?) else {
        return Err(refuse("it has no header".to_owned()));
    };
    let count = usize::try_from(u64::from_le_bytes(count)).unwrap_or(usize::MAX);
    let most = LONGEST.min(len - COUNT);
    if count > most {
        return Err(refuse(format!("its header must have at most {most}, but has {count}")));
    }
    let start = COUNT + count;
    let header: Metadata =
        serde_json::from_slice(&file.bytes(COUNT..start)?).map_err(|error| refuse(format!("its header: {error}")))?;
    let end = start.saturating_add(header.data_len());
    if end != len {
        return Err(refuse(format!("its tensors end at {end}")));
    }
    let entry = |(name, tensor): (String, &TensorInfo)| {
        let (first, last) = tensor.data_offsets;
        let format = match tensor.dtype {
            Dtype::F64 => Ok(Format::F64),
            Dtype::F32 => Ok(Format::F32),
            Dtype::F16 => Ok(Format::F16),
            Dtype::BF16 => Ok(Format::Bf16),
            other => Err(format!("{other:?}")),
        };
        Entry { name, format, shape: tensor.shape.clone(), bytes: start + first..start + last }
    };
    Ok(header.tensors().into_iter().map(entry).collect())
}

/// A shape without the ones at its end: a 1×1 convolution has the weights of a linear layer.
fn trimmed(shape: &[usize]) -> &[usize] {
    let end = shape.iter().rposition(|dim| *dim != 1).map_or(0, |last| last + 1);
    &shape[..end]
}

/// A place in the tree of tensor names; its steps are the names in the file.
#[derive(Clone)]
pub(crate) struct Scope<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl Scope<'_> {
    /// The scope below this one.
    pub fn at(&self, step: impl Display) -> Self {
        Self { weights: self.weights, prefix: self.name(&step.to_string()) }
    }

    /// [`Scope::at`] `step`, or at the `old` name if only that has tensors below it.
    pub fn at_or(&self, step: &str, old: &str) -> Self {
        let prefix = format!("{}.", self.name(old));
        if self.weights.stored.keys().any(|name| name.starts_with(&prefix)) { self.at(old) } else { self.at(step) }
    }

    /// A tensor as it is stored.
    fn parameter(&self, name: &str, shape: &[usize]) -> Result<Parameter<'_>> {
        self.weights.read(&self.name(name), shape)
    }

    /// A tensor where the part's layers live.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.parameter(name, shape)?.tensor(&self.weights.place)
    }

    /// A tensor's values on the host.
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.parameter(name, shape)?.values()
    }

    fn name(&self, step: &str) -> String {
        if self.prefix.is_empty() { step.to_owned() } else { format!("{}.{step}", self.prefix) }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
    use candle_core::{DType, Device, Tensor};
    use half::f16;

    use super::{HashMap, Place, Weights};

    fn part(tensors: &[(&str, Tensor)]) -> (tempfile::TempDir, Weights) {
        let folder = tempfile::tempdir().unwrap();
        let tensors: HashMap<String, Tensor> =
            tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
        candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
        let weights = Weights::open(folder.path(), "model", &Place::host()).unwrap();
        (folder, weights)
    }

    fn ones(shape: &[usize]) -> Tensor {
        Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn every_format_on_disk_is_read_in_the_wanted_one() {
        let values = Tensor::new(&[1f32, -2.5, 0.125], &Device::Cpu).unwrap();
        let stored = |dtype| values.to_dtype(dtype).unwrap();
        let (_folder, weights) = part(&[
            ("a", stored(DType::F32)),
            ("b", stored(DType::F16)),
            ("c", stored(DType::BF16)),
            ("d", stored(DType::F64)),
        ]);
        for name in ["a", "b", "c", "d"] {
            assert_eq!(weights.root().tensor(name, &[3]).unwrap().to_values().unwrap(), [1.0, -2.5, 0.125]);
        }
        weights.finish(|_| false).unwrap();
    }

    #[test]
    fn missing_misshapen_and_extra_tensors_are_all_named_in_one_error() {
        let (_folder, weights) =
            part(&[("block.weight", ones(&[2, 3])), ("block.more", ones(&[1])), ("known", ones(&[1]))]);
        let block = weights.root().at("block");
        block.tensor("weight", &[3, 2]).unwrap();
        block.tensor("bias", &[3]).unwrap();
        let error = weights.finish(|name| name == "known").unwrap_err().to_string();
        assert!(error.contains("missing tensors: block.bias;"), "{error}");
        assert!(error.contains("block.weight [2, 3] instead of [3, 2]"), "{error}");
        assert!(error.ends_with("tensors that this model does not have: block.more"), "{error}");
    }

    #[test]
    fn a_one_by_one_convolution_is_read_as_a_linear_layer_and_back() {
        let (_folder, weights) = part(&[("conv", ones(&[4, 2, 1, 1])), ("linear", ones(&[4, 2]))]);
        assert_eq!(weights.root().tensor("conv", &[4, 2]).unwrap().dims(), [4, 2]);
        assert_eq!(weights.root().tensor("linear", &[4, 2, 1, 1]).unwrap().dims(), [4, 2, 1, 1]);
        weights.finish(|_| false).unwrap();
    }

    #[test]
    fn a_huge_missing_tensor_costs_no_memory() {
        let (_folder, weights) = part(&[("a", ones(&[1]))]);
        let error = weights.root().tensor("huge", &[1 << 20, 1 << 20]).unwrap_err().to_string();
        assert!(error.contains("missing tensors: huge"), "{error}");
    }

    #[test]
    fn integers_are_refused_where_numbers_are_due() {
        let (_folder, weights) = part(&[("ids", Tensor::new(&[1u32], &Device::Cpu).unwrap())]);
        let error = weights.root().tensor("ids", &[1]).unwrap_err().to_string();
        assert!(error.contains("tensor `ids` has format U32"), "{error}");
    }

    #[test]
    fn the_tensors_of_a_gguf_file_are_read_in_the_order_of_their_rows() {
        let folder = tempfile::tempdir().unwrap();
        let values: Vec<f32> = (0..4 * 64).map(|value| (value as f32 / 9.0).sin()).collect();
        let weight = Tensor::from_slice(&values, (4, 64), &Device::Cpu).unwrap();
        let quantised = QTensor::quantize(&weight, GgmlDType::Q8_0).unwrap();
        let bias = QTensor::quantize(&weight.narrow(1, 0, 1).unwrap().flatten_all().unwrap(), GgmlDType::F16).unwrap();
        let mut file = std::fs::File::create(folder.path().join("model.gguf")).unwrap();
        gguf_file::write(&mut file, &[], &[("a.weight", &quantised), ("a.bias", &bias)]).unwrap();
        let weights = Weights::open(folder.path(), "model", &Place::host()).unwrap();
        let expected = quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(weights.root().tensor("a.weight", &[4, 64]).unwrap().to_values().unwrap(), expected);
        let layer = weights.root().at("a").linear(64, 4).unwrap();
        let mut one = [0.0; 64];
        one[5] = 1.0;
        let got = layer.forward(&crate::ops::Tensor::new(&one, &[1, 64], &Place::host()).unwrap()).unwrap();
        for (output, value) in got.to_values().unwrap().into_iter().enumerate() {
            let bias = f16::from_f32(values[output * 64]).to_f32();
            assert_eq!(value, expected[output * 64 + 5] + bias);
        }
        weights.finish(|_| false).unwrap();
    }

    #[test]
    fn a_file_that_is_cut_short_while_it_is_read_is_named() {
        let (folder, weights) = part(&[("a.weight", ones(&[64, 64])), ("a.bias", ones(&[64])), ("b", ones(&[64]))]);
        let file = std::fs::File::options().write(true).open(folder.path().join("model.safetensors")).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1000).unwrap();
        let errors = [
            weights.root().at("a").linear(64, 64).err(),
            weights.root().tensor("b", &[64]).err(),
            weights.root().values("b", &[64]).err(),
        ];
        for error in errors {
            let error = error.unwrap().to_string();
            assert!(error.contains("model.safetensors: bytes ") && error.contains(" cannot be read: "), "{error}");
        }
    }

    #[test]
    fn a_truncated_file_is_named() {
        let (folder, weights) = part(&[("a", ones(&[64]))]);
        drop(weights);
        let path = folder.path().join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        for keep in [0, 4, 20, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..keep]).unwrap();
            let error = Weights::open(folder.path(), "model", &Place::host()).err().unwrap().to_string();
            assert!(error.contains("model.safetensors: "), "{error}");
        }
    }
}
