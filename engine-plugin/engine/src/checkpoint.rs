//! Tensors of a safetensors checkpoint, single-file or sharded.
//!
//! Only headers stay in memory: a tensor is read when asked for, by positioned
//! reads of bounded size, and converted to f32 on the way. Files are not
//! mapped: a truncated mapping would end the process, a truncated read is an
//! error.
//!
//! Every byte that becomes a weight also goes through one BLAKE3 hasher, with
//! the tensor's name, element type and shape before it, so that the digest of
//! the weights costs no second pass. Tensors that the model does not ask for
//! (`rotary_emb.inv_freq`, a tied `lm_head`) are neither read nor hashed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata};
use serde::Deserialize;

/// An open checkpoint directory.
pub struct Checkpoint {
    files: Vec<Shard>,
    tensors: BTreeMap<String, Location>,
    hasher: blake3::Hasher,
    /// Raw bytes of the rows being converted; kept between tensors.
    staging: Vec<u8>,
    rows: Vec<f32>,
}

struct Shard {
    path: PathBuf,
    file: File,
}

struct Location {
    shard: usize,
    /// Of the first byte, in the file.
    offset: u64,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards that
    /// `model.safetensors.index.json` names, and reads their headers.
    ///
    /// # Errors
    ///
    /// [`CheckpointError`] when no checkpoint is there, or a header does not
    /// describe exactly the bytes of its file.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let single = dir.join(SINGLE_FILE);
        let index_path = dir.join(INDEX_FILE);
        let mut checkpoint = Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
            hasher: blake3::Hasher::new(),
            staging: Vec::new(),
            rows: Vec::new(),
        };
        if single.exists() {
            checkpoint.add_file(single)?;
            return Ok(checkpoint);
        }
        if !index_path.exists() {
            return Err(CheckpointError::NoWeights(dir.to_owned()));
        }
        let bytes = std::fs::read(&index_path).map_err(|source| CheckpointError::Io {
            path: index_path.clone(),
            source,
        })?;
        let index: Index =
            serde_json::from_slice(&bytes).map_err(|source| CheckpointError::Index {
                path: index_path.clone(),
                source,
            })?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            // A shard is a sibling; anything else would read outside the model.
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(CheckpointError::ShardName {
                    path: index_path,
                    name: name.clone(),
                });
            }
            checkpoint.add_file(dir.join(name))?;
        }
        Ok(checkpoint)
    }

    /// Checks that the tensor `name` exists with `shape` and a float type that
    /// the engine converts.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::MissingTensor`], [`CheckpointError::Shape`] or
    /// [`CheckpointError::Dtype`].
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<(), CheckpointError> {
        self.find(name, shape).map(|_| ())
    }

    fn find(&self, name: &str, shape: &[usize]) -> Result<&Location, CheckpointError> {
        let Some(at) = self.tensors.get(name) else {
            return Err(CheckpointError::MissingTensor {
                name: name.to_owned(),
                expected: shape.to_vec(),
            });
        };
        if at.shape != shape {
            return Err(CheckpointError::Shape {
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: at.shape.clone(),
            });
        }
        match at.dtype {
            Dtype::F32 | Dtype::BF16 | Dtype::F16 => Ok(at),
            found => Err(CheckpointError::Dtype {
                name: name.to_owned(),
                found,
            }),
        }
    }

    /// Reads the tensor `name` of `shape`, and hands it on as f32, a few whole
    /// rows at a time and in order. A row is the last dimension.
    ///
    /// # Errors
    ///
    /// [`CheckpointError::MissingTensor`], [`CheckpointError::Shape`] or
    /// [`CheckpointError::Dtype`] when the tensor is not what the model needs,
    /// [`CheckpointError::Io`] when reading fails.
    pub fn read_rows(
        &mut self,
        name: &str,
        shape: &[usize],
        rows_per_call: usize,
        mut each: impl FnMut(&[f32]),
    ) -> Result<(), CheckpointError> {
        let at = self.find(name, shape)?;
        let element_bytes = if at.dtype == Dtype::F32 { 4 } else { 2 };
        let (offset, dtype) = (at.offset, at.dtype);
        let shard = &self.files[at.shard];
        hash_description(&mut self.hasher, name, dtype, shape);

        let Some((&row, outer)) = shape.split_last() else {
            return Ok(());
        };
        let mut remaining = outer.iter().product::<usize>();
        let mut offset = offset;
        while remaining > 0 {
            let rows = remaining.min(rows_per_call);
            let bytes = rows * row * element_bytes;
            self.staging.resize(bytes, 0);
            shard
                .file
                .read_exact_at(&mut self.staging, offset)
                .map_err(|source| CheckpointError::Io {
                    path: shard.path.clone(),
                    source,
                })?;
            self.hasher.update(&self.staging);
            self.rows.clear();
            convert(&self.staging, dtype, &mut self.rows);
            each(&self.rows);
            offset += bytes as u64;
            remaining -= rows;
        }
        Ok(())
    }

    /// Reads a one-dimensional tensor of `len` elements.
    ///
    /// # Errors
    ///
    /// As [`Self::read_rows`].
    pub fn read_vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, CheckpointError> {
        let mut values = Vec::with_capacity(len);
        self.read_rows(name, &[len], 1, |row| values.extend_from_slice(row))?;
        Ok(values)
    }

    /// BLAKE3 over name, element type, shape and data of every tensor read so
    /// far, in the order of reading. Independent of how files are sharded.
    pub fn digest(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }

    fn add_file(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let io = |source| CheckpointError::Io {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(io)?;
        let file_bytes = file.metadata().map_err(io)?.len();
        let mut prefix = [0; LENGTH_BYTES];
        if file_bytes < prefix.len() as u64 {
            return Err(CheckpointError::Truncated { path, file_bytes });
        }
        file.read_exact_at(&mut prefix, 0).map_err(io)?;
        let header_bytes = u64::from_le_bytes(prefix);
        let data_start = header_bytes
            .checked_add(prefix.len() as u64)
            .filter(|&end| end <= file_bytes && header_bytes <= MAX_HEADER_BYTES);
        let Some(data_start) = data_start else {
            return Err(CheckpointError::HeaderLength {
                path,
                header_bytes,
                file_bytes,
            });
        };
        let header_len = usize::try_from(header_bytes).expect("at most MAX_HEADER_BYTES");
        let mut header = vec![0; header_len];
        file.read_exact_at(&mut header, prefix.len() as u64)
            .map_err(io)?;
        // `SafeTensors::read_metadata` wants the whole file in memory; `Metadata`
        // checks offsets against shapes the same way when it is deserialised.
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|source| CheckpointError::Header {
                path: path.clone(),
                source,
            })?;
        if data_start.checked_add(metadata.data_len() as u64) != Some(file_bytes) {
            return Err(CheckpointError::Truncated { path, file_bytes });
        }
        for (name, info) in metadata.tensors() {
            let location = Location {
                shard: self.files.len(),
                offset: data_start + info.data_offsets.0 as u64,
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            if self.tensors.insert(name.clone(), location).is_some() {
                return Err(CheckpointError::DuplicateTensor { path, name });
            }
        }
        self.files.push(Shard { path, file });
        Ok(())
    }
}

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const LENGTH_BYTES: usize = 8;
/// The limit of the safetensors format itself.
const MAX_HEADER_BYTES: u64 = 100_000_000;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn hash_description(hasher: &mut blake3::Hasher, name: &str, dtype: Dtype, shape: &[usize]) {
    hasher.update(&(name.len() as u64).to_le_bytes());
    hasher.update(name.as_bytes());
    hasher.update(&[match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        _ => 2,
    }]);
    hasher.update(&(shape.len() as u64).to_le_bytes());
    for &extent in shape {
        hasher.update(&(extent as u64).to_le_bytes());
    }
}

fn convert(bytes: &[u8], dtype: Dtype, out: &mut Vec<f32>) {
    match dtype {
        Dtype::F32 => {
            out.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&element| f32::from_le_bytes(element)),
            );
        }
        Dtype::F16 => {
            out.extend(
                bytes
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&e| f16::from_le_bytes(e).to_f32()),
            );
        }
        _ => out.extend(
            bytes
                .as_chunks()
                .0
                .iter()
                .map(|&e| bf16::from_le_bytes(e).to_f32()),
        ),
    }
}

/// Why a checkpoint cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Neither a single file nor an index of shards.
    #[error("{}: neither {SINGLE_FILE} nor {INDEX_FILE}", .0.display())]
    NoWeights(PathBuf),
    /// A file could not be opened or read.
    #[error("{}: cannot be read", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The index of shards is not what it should be.
    #[error("{}: not an index of shards", .path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// The index names a shard outside its directory.
    #[error("{}: {name:?} is not a file name", .path.display())]
    ShardName {
        /// The index file.
        path: PathBuf,
        /// The shard it names.
        name: String,
    },
    /// A file is longer or shorter than its header says.
    #[error("{}: its {file_bytes} bytes are not those that its header describes", .path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length.
        file_bytes: u64,
    },
    /// The header's length is larger than the file or than the format allows.
    #[error("{}: header of {header_bytes} bytes in a file of {file_bytes}", .path.display())]
    HeaderLength {
        /// The file.
        path: PathBuf,
        /// The length that the file claims for its header.
        header_bytes: u64,
        /// The file's length.
        file_bytes: u64,
    },
    /// The header is not valid.
    #[error("{}: bad safetensors header", .path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
    /// Two shards hold a tensor of the same name.
    #[error("{}: tensor {name} is in another shard too", .path.display())]
    DuplicateTensor {
        /// The second file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// The model needs a tensor that the checkpoint lacks.
    #[error("tensor {name} of shape {expected:?} is missing")]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The shape that the config implies.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the config implies.
    #[error("tensor {name} has shape {found:?}, the config implies {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// The shape that the config implies.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has an element type that the engine does not convert.
    #[error("tensor {name} has element type {found:?}; f32, f16 and bf16 are read")]
    Dtype {
        /// The tensor.
        name: String,
        /// The element type in the file.
        found: Dtype,
    },
}
