//! What goes wrong with devices.

use cudarc::cublaslt::result::CublasError;
use cudarc::driver::DriverError;
use cudarc::nvrtc::CompileError;
use kvasir_cuda::{ComputeCapability, CudaDecodeError};

use super::DeviceRoomError;
use crate::checkpoint::CheckpointError;
use crate::kv::{BLOCK_TOKENS, KvError};
use crate::model::LoadError;

/// Why there is no device to compute on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceUnavailable {
    /// There is no driver.
    #[error("no NVIDIA driver (libcuda.so.1); compute on the CPU, or install one")]
    Driver,
    /// There is no compiler for kernels.
    #[error(
        "no NVRTC (libnvrtc.so); install CUDA's, or `pip install nvidia-cuda-nvrtc-cu12` and name its lib folder in LD_LIBRARY_PATH"
    )]
    Compiler,
    /// There is no library for products.
    #[error(
        "no cuBLASLt (libcublasLt.so); install CUDA's, or `pip install nvidia-cublas-cu12` and name its lib folder in LD_LIBRARY_PATH"
    )]
    Products,
    /// The library for products does not start.
    #[error("cuBLASLt does not start; see whether it is made for this driver")]
    ProductsFailed {
        /// What it says.
        #[source]
        source: DeviceError,
    },
    /// There is no such device, or it does not answer.
    #[error("CUDA device {ordinal} cannot be used; see nvidia-smi, and CUDA_VISIBLE_DEVICES")]
    Device {
        /// Which.
        ordinal: usize,
        /// What the driver says.
        #[source]
        source: DriverError,
    },
    /// The kernels cannot be compiled for the device.
    #[error("kernels do not compile for compute capability {}.{}", .capability.major, .capability.minor)]
    Kernels {
        /// Of the device.
        capability: ComputeCapability,
        /// What the compiler says.
        #[source]
        source: CompileError,
    },
    /// Weights or pages do not fit.
    #[error(
        "the device has {free} bytes free where {wanted} are wanted; take fewer pages, or a smaller type"
    )]
    Memory {
        /// Bytes of what does not fit.
        wanted: u64,
        /// Bytes that are free.
        free: u64,
    },
}

/// Why a device did not do what was asked of it. What it was computing is lost.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The driver reports a failure.
    #[error("the device failed")]
    Driver(#[from] DriverError),
    /// A product failed.
    #[error("cuBLASLt failed")]
    Products(#[from] CublasError),
}

/// Why a model cannot be loaded on a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceLoadError {
    /// Neither could it be for the CPU.
    #[error(transparent)]
    Model(#[from] LoadError),
    /// There is no room.
    #[error(transparent)]
    Unavailable(#[from] DeviceUnavailable),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<CheckpointError> for DeviceLoadError {
    fn from(error: CheckpointError) -> Self {
        Self::Model(error.into())
    }
}

impl From<DeviceRoomError> for DeviceLoadError {
    fn from(error: DeviceRoomError) -> Self {
        match error {
            DeviceRoomError::Unavailable(error) => Self::Unavailable(error),
            DeviceRoomError::Device(error) => Self::Device(error),
        }
    }
}

/// Why pages of a device cannot be made, written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DevicePoolError {
    /// A page, or a range of them, cannot be used.
    #[error(transparent)]
    Pages(#[from] KvError),
    /// There is no room.
    #[error(transparent)]
    Unavailable(#[from] DeviceUnavailable),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An encoded layer does not begin with a page.
    #[error("an encoded layer begins at token {0}, not at a multiple of {BLOCK_TOKENS}")]
    FirstToken(usize),
    /// An encoded layer is of another shape than the pages.
    #[error("encoded layer {0} of a batch is of another shape than the pages")]
    Shape(usize),
    /// Only a GPU decodes.
    #[error("the pages are not on a GPU, which is what decodes")]
    NotOnGpu,
    /// The layers could not be decoded.
    #[error("encoded layers were not decoded")]
    Decode(#[from] CudaDecodeError),
}

impl From<DeviceRoomError> for DevicePoolError {
    fn from(error: DeviceRoomError) -> Self {
        match error {
            DeviceRoomError::Unavailable(error) => Self::Unavailable(error),
            DeviceRoomError::Device(error) => Self::Device(error),
        }
    }
}
