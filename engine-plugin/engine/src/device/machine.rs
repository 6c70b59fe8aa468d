//! Memory, launches, products and copies of a device.
//!
//! A [`Machine`] is a GPU; in tests, it may be an emulation whose kernels are the same source
//! compiled as C++. Work is in two streams, [`Stream::Compute`] and [`Stream::Copy`], each of
//! which goes on by itself; [`Event`]s order one after the other. Addresses are numbers: who
//! launches a kernel answers for what it reads and writes.

use std::sync::Arc;

use cudarc::driver::CudaSlice;

use super::cuda::{Cuda, CudaEvent, CudaPinned};
#[cfg(test)]
use super::emulated::{Allocation, Emulated, EmulatedPinned};
use super::launch::Launch;
use super::{DeviceError, DeviceUnavailable};
use crate::kv::KvDtype;

/// A device and what computes on it.
#[derive(Debug)]
pub(super) enum Machine {
    /// An NVIDIA GPU.
    Cuda(Box<Cuda>),
    /// A CPU that runs the kernels.
    #[cfg(test)]
    Emulated(Emulated),
}

/// A sequence of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    /// Of the layers.
    Compute,
    /// Between host and device.
    Copy,
}

/// A place in a stream: work before it is done, or not.
#[derive(Debug)]
pub(super) enum Event {
    Cuda(CudaEvent),
    #[cfg(test)]
    Emulated(u64),
}

/// Memory of a device. Before it is freed, all that was asked of the device is done.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) address: u64,
    pub(super) bytes: usize,
    owner: Owner,
}

#[derive(Debug)]
enum Owner {
    Cuda(CudaSlice<u8>),
    #[cfg(test)]
    Emulated {
        /// Frees it.
        _allocation: Allocation,
    },
}

/// Memory of the host that a device copies from and to by itself.
#[derive(Debug)]
pub(super) enum Pinned {
    Cuda(CudaPinned),
    #[cfg(test)]
    Emulated(EmulatedPinned),
}

/// `output[row][outputs] (+)= input[row][inputs] · weight[outputs][inputs]ᵀ`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) weight: u64,
    pub(super) input: u64,
    /// f32.
    pub(super) output: u64,
    pub(super) rows: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// Of weight and input.
    pub(super) dtype: KvDtype,
    /// Whether the output is added to.
    pub(super) accumulate: bool,
}

/// One line for each form.
macro_rules! on_either {
    ($machine:expr, $it:ident => $do:expr) => {
        match $machine {
            Machine::Cuda($it) => $do,
            #[cfg(test)]
            Machine::Emulated($it) => $do,
        }
    };
}

impl Machine {
    /// The GPU of this number.
    pub(super) fn cuda(ordinal: usize) -> Result<Arc<Self>, DeviceUnavailable> {
        Ok(Arc::new(Self::Cuda(Box::new(Cuda::new(ordinal)?))))
    }

    /// What it is called.
    pub(super) fn name(&self) -> Result<String, DeviceError> {
        on_either!(self, it => it.name())
    }

    /// Multiprocessors, each of which runs some blocks at once.
    pub(super) fn processors(&self) -> usize {
        on_either!(self, it => it.processors())
    }

    /// Bytes that can be allocated, about.
    pub(super) fn free_bytes(&self) -> Result<u64, DeviceError> {
        on_either!(self, it => it.free_bytes())
    }

    /// Memory that holds anything; at least one byte of it.
    pub(super) fn alloc(&self, bytes: usize) -> Result<Memory, DeviceError> {
        let bytes = bytes.max(1);
        let (address, owner) = match self {
            Self::Cuda(cuda) => {
                let (address, slice) = cuda.alloc(bytes)?;
                (address, Owner::Cuda(slice))
            }
            #[cfg(test)]
            Self::Emulated(emulated) => {
                let (address, _allocation) = emulated.alloc(bytes);
                (address, Owner::Emulated { _allocation })
            }
        };
        Ok(Memory {
            address,
            bytes,
            owner,
        })
    }

    /// Memory of the host to copy by.
    pub(super) fn alloc_pinned(&self, bytes: usize) -> Result<Pinned, DeviceError> {
        Ok(match self {
            Self::Cuda(cuda) => Pinned::Cuda(cuda.alloc_pinned(bytes)?),
            #[cfg(test)]
            Self::Emulated(_) => Pinned::Emulated(EmulatedPinned::new(bytes)),
        })
    }

    /// Fills memory with zeros, in the stream of computing.
    pub(super) fn fill_zero(&self, memory: &Memory) -> Result<(), DeviceError> {
        on_either!(self, it => it.fill_zero(memory.address, memory.bytes))
    }

    /// Copies to memory, in the stream of computing; `from` is free when this returns.
    pub(super) fn upload(
        &self,
        memory: &Memory,
        at: usize,
        from: &[u8],
    ) -> Result<(), DeviceError> {
        assert!(at + from.len() <= memory.bytes, "uploads end inside memory");
        on_either!(self, it => it.upload(memory.address + at as u64, from))
    }

    /// Copies from memory, after all that was asked of the stream of computing.
    pub(super) fn download(
        &self,
        memory: &Memory,
        at: usize,
        out: &mut [u8],
    ) -> Result<(), DeviceError> {
        assert!(
            at + out.len() <= memory.bytes,
            "downloads end inside memory"
        );
        on_either!(self, it => it.download(memory.address + at as u64, out))
    }

    /// Copies the first bytes of pinned memory, in the stream of copies. They must stay as they
    /// are until that is done.
    pub(super) fn copy_in(
        &self,
        pinned: &Pinned,
        bytes: usize,
        memory: &Memory,
    ) -> Result<(), DeviceError> {
        assert!(bytes <= memory.bytes, "copies end inside memory");
        match (self, pinned) {
            (Self::Cuda(cuda), Pinned::Cuda(pinned)) => cuda.copy_in(pinned, bytes, memory.address),
            #[cfg(test)]
            (Self::Emulated(emulated), Pinned::Emulated(pinned)) => {
                emulated.copy_in(pinned, bytes, memory.address)
            }
            #[cfg(test)]
            _ => unreachable!("pinned memory of another machine"),
        }
    }

    /// Copies from a place in memory to the first bytes of pinned memory, in the stream of
    /// copies.
    pub(super) fn copy_out(
        &self,
        memory: &Memory,
        at: usize,
        bytes: usize,
        pinned: &Pinned,
    ) -> Result<(), DeviceError> {
        assert!(at + bytes <= memory.bytes, "copies end inside memory");
        let address = memory.address + at as u64;
        match (self, pinned) {
            (Self::Cuda(cuda), Pinned::Cuda(pinned)) => cuda.copy_out(address, bytes, pinned),
            #[cfg(test)]
            (Self::Emulated(emulated), Pinned::Emulated(pinned)) => {
                emulated.copy_out(address, bytes, pinned)
            }
            #[cfg(test)]
            _ => unreachable!("pinned memory of another machine"),
        }
    }

    /// Runs a kernel.
    pub(super) fn launch(&self, stream: Stream, launch: Launch) -> Result<(), DeviceError> {
        if launch.blocks == 0 {
            return Ok(());
        }
        on_either!(self, it => it.launch(stream, launch))
    }

    /// Multiplies, in the stream of computing.
    pub(super) fn multiply(&self, product: Product) -> Result<(), DeviceError> {
        if product.rows == 0 {
            return Ok(());
        }
        on_either!(self, it => it.multiply(product))
    }

    /// Where a stream is now.
    pub(super) fn record(&self, stream: Stream) -> Result<Event, DeviceError> {
        Ok(match self {
            Self::Cuda(cuda) => Event::Cuda(cuda.record(stream)?),
            #[cfg(test)]
            Self::Emulated(emulated) => Event::Emulated(emulated.record(stream)),
        })
    }

    /// Has a stream wait for what was before an event.
    pub(super) fn wait(&self, stream: Stream, event: &Event) -> Result<(), DeviceError> {
        match (self, event) {
            (Self::Cuda(cuda), Event::Cuda(event)) => cuda.wait(stream, event),
            #[cfg(test)]
            (Self::Emulated(emulated), Event::Emulated(event)) => {
                emulated.wait(stream, *event);
                Ok(())
            }
            #[cfg(test)]
            _ => unreachable!("an event of another machine"),
        }
    }

    /// Waits for what was before an event.
    pub(super) fn finish(&self, event: &Event) -> Result<(), DeviceError> {
        match (self, event) {
            (Self::Cuda(cuda), Event::Cuda(event)) => cuda.finish(event),
            #[cfg(test)]
            (Self::Emulated(emulated), Event::Emulated(event)) => {
                emulated.finish(*event);
                Ok(())
            }
            #[cfg(test)]
            _ => unreachable!("an event of another machine"),
        }
    }
}

impl Memory {
    /// As the codec's decoder wants it, of a GPU.
    pub(super) fn as_cuda(&mut self) -> Option<&mut CudaSlice<u8>> {
        match &mut self.owner {
            Owner::Cuda(slice) => Some(slice),
            #[cfg(test)]
            Owner::Emulated { .. } => None,
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &self.owner {
            // It is freed in the order of one stream, and used in both. A device that failed
            // uses it no more.
            Owner::Cuda(slice) => drop(slice.context().synchronize()),
            #[cfg(test)]
            Owner::Emulated { .. } => {}
        }
    }
}

impl Pinned {
    /// Writes its first bytes. No copy may be under way.
    pub(super) fn write(&mut self, parts: &[&[u8]]) {
        match self {
            Self::Cuda(pinned) => pinned.write(parts),
            #[cfg(test)]
            Self::Emulated(pinned) => pinned.write(parts),
        }
    }

    /// Reads its first bytes. No copy may be under way.
    pub(super) fn read(&self, out: &mut [u8]) {
        match self {
            Self::Cuda(pinned) => pinned.read(out),
            #[cfg(test)]
            Self::Emulated(pinned) => pinned.read(out),
        }
    }
}
