//! The engine on a GPU: weights, pages and layers in the memory of a device.
//!
//! [`DeviceModel`] runs the same [`Step`](crate::Step)s as [`Model`](crate::Model), of the same
//! checkpoints, over the pages of a [`DevicePool`]. Products are cuBLASLt's; all else is kernels
//! of our own (`device/*.cu`), which NVRTC compiles for the device at hand. Weights are f32, f16
//! or bf16, and so is what they are multiplied with; sums, the residual stream and attention are
//! f32, and pages have a type of their own.
//!
//! # Copies
//!
//! Layers of the cache come and go by a stream of their own, through two page-locked buffers by
//! turns, while layers compute: a layer waits for what was landed in its own pages and for
//! nothing else, and pages are overwritten only after the layer that read them. Encoded layers
//! are decoded where they are wanted: see [`DevicePool::decode_layers`].
//!
//! # Where there is no GPU
//!
//! No library of CUDA is linked. What is missing is said by [`DeviceUnavailable`]. The kernels
//! are C++ too: tests run them on a CPU (`emulation/`), under a sanitizer, with all that is above
//! them, and compare with the CPU's engine. There, streams are queues whose order is the least
//! expected one that events permit.
//!
//! # What has been run on a GPU
//!
//! **Nothing yet.** Kernels compile for every device that NVRTC 12.9 knows; they and everything
//! above them have been run in emulation alone. Calls of the driver and of cuBLASLt have been
//! compiled and no more. So this is a library: `kvasir-engine serve` does not use it, and
//! neither speed nor last bits are promised. `kvasir-bench device` runs it where there is a GPU.
//!
//! # Results
//!
//! Not those of the CPU bit for bit: sums are in another order, and rows of a batch of another
//! size may be multiplied by another algorithm. So K and V that were computed here are as good
//! as the CPU's, and not the same.
//!
//! Not here: sampling other than greedy, which takes [`Logits`](crate::Logits) on the host;
//! paging to disk; choosing pages, which [`BeforeDeviceLayer`] lets the caller do.

mod attention;
mod backend;
mod cuda;
#[cfg(test)]
mod emulated;
mod error;
mod forward;
mod launch;
mod layer;
mod machine;
mod pool;
mod products;
mod scratch;
mod staging;
#[cfg(test)]
mod tests;
mod weights;

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::ModelConfig;
use crate::kv::KvDtype;
use crate::model;
use machine::{Machine, Stream};
use weights::DeviceWeights;

pub use backend::DeviceBackend;
pub use error::{DeviceError, DeviceLoadError, DevicePoolError, DeviceUnavailable};
pub use layer::{BeforeDeviceLayer, LayerRows};
pub use pool::{DevicePool, EncodedLayer};
pub use scratch::DeviceScratch;

/// A device, and what runs on it.
#[derive(Clone, Debug)]
pub struct Device {
    machine: Arc<Machine>,
}

impl Device {
    /// The NVIDIA GPU of this number.
    ///
    /// # Errors
    ///
    /// [`DeviceUnavailable`] says what is missing.
    pub fn cuda(ordinal: usize) -> Result<Self, DeviceUnavailable> {
        let machine = Machine::cuda(ordinal)?;
        Ok(Self { machine })
    }

    /// What it is called.
    ///
    /// # Errors
    ///
    /// The device failed.
    pub fn name(&self) -> Result<String, DeviceError> {
        self.machine.name()
    }

    /// How long so many copies of a page-locked buffer take, to the device and from it: what
    /// copies of layers are measured by.
    ///
    /// # Errors
    ///
    /// The device failed.
    pub fn time_copies(&self, bytes: usize, copies: usize) -> Result<[Duration; 2], DeviceError> {
        let machine = &self.machine;
        let (memory, pinned) = (machine.alloc(bytes)?, machine.alloc_pinned(bytes)?);
        let begin = Instant::now();
        for _ in 0..copies {
            machine.copy_in(&pinned, bytes, &memory)?;
        }
        machine.finish(&machine.record(Stream::Copy)?)?;
        let there = begin.elapsed();
        for _ in 0..copies {
            machine.copy_out(&memory, 0, bytes, &pinned)?;
        }
        machine.finish(&machine.record(Stream::Copy)?)?;
        Ok([there, begin.elapsed() - there])
    }

    /// That there is room for something.
    fn check_room(&self, wanted: u64) -> Result<(), DeviceRoomError> {
        let free = self.machine.free_bytes()?;
        if wanted > free {
            return Err(DeviceUnavailable::Memory { wanted, free }.into());
        }
        Ok(())
    }
}

/// Why there is no room.
enum DeviceRoomError {
    Unavailable(DeviceUnavailable),
    Device(DeviceError),
}

impl From<DeviceUnavailable> for DeviceRoomError {
    fn from(error: DeviceUnavailable) -> Self {
        Self::Unavailable(error)
    }
}

impl From<DeviceError> for DeviceRoomError {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

/// Weights in the memory of a device, and config.
pub struct DeviceModel {
    machine: Arc<Machine>,
    config: ModelConfig,
    weights: DeviceWeights,
    weights_digest: [u8; 32],
    dtype: KvDtype,
}

impl DeviceModel {
    /// Reads `config.json` and the safetensors checkpoint in `dir`, as
    /// [`Model::load`](crate::Model::load) does, and puts matrices on a device as `dtype`.
    ///
    /// # Errors
    ///
    /// [`DeviceLoadError`]; nothing of the model is kept then.
    pub fn load(device: &Device, dir: &Path, dtype: KvDtype) -> Result<Self, DeviceLoadError> {
        let config = model::read_config(dir)?;
        let machine = device.machine.clone();
        device.check_room(DeviceWeights::bytes(&config, dtype))?;
        let (weights, weights_digest) = DeviceWeights::load(&machine, dir, &config, dtype)?;
        Ok(Self {
            machine,
            config,
            weights,
            weights_digest,
            dtype,
        })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The same as [`Model::weights_digest`](crate::Model::weights_digest).
    pub fn weights_digest(&self) -> [u8; 32] {
        self.weights_digest
    }

    /// Bytes that matrices take on the device.
    pub fn weights_bytes(&self) -> u64 {
        DeviceWeights::bytes(&self.config, self.dtype)
    }
}

impl fmt::Debug for DeviceModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceModel")
            .field("config", &self.config)
            .field("dtype", &self.dtype)
            .finish_non_exhaustive()
    }
}
