//! Products of matrices, by cuBLASLt.

#![expect(
    unsafe_code,
    reason = "calls of cuBLASLt, which knows nothing of lifetimes"
)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::DeviceError;
use super::machine::Product;
use crate::kv::KvDtype;

/// Whether the library is there.
pub(super) fn has_products() -> bool {
    // SAFETY: looks for a library, which is NVIDIA's where it has this name.
    unsafe { sys::is_culib_present() }
}

/// Multiplies in one stream.
#[derive(Debug)]
pub(super) struct Products {
    handle: Handle,
    stream: Arc<CudaStream>,
    workspace: u64,
    /// Keeps the workspace.
    _memory: CudaSlice<u8>,
    /// What the library found best, by what decides it.
    algorithms: Mutex<HashMap<Shape, sys::cublasLtMatmulAlgo_t>>,
}

/// What decides which algorithm is the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    inputs: usize,
    outputs: usize,
    dtype: KvDtype,
    accumulate: bool,
}

#[derive(Debug)]
struct Handle(sys::cublasLtHandle_t);

// SAFETY: cuBLASLt's handles may be used by any thread, and by several at once.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handle.
        let destroyed = unsafe { result::destroy_handle(self.0) };
        debug_assert!(destroyed.is_ok(), "a handle that exists");
    }
}

impl Products {
    pub(super) fn new(stream: Arc<CudaStream>) -> Result<Self, DeviceError> {
        stream.context().bind_to_thread()?;
        let handle = Handle(result::create_handle()?);
        // SAFETY: a workspace may hold anything.
        let memory = unsafe { stream.alloc::<u8>(WORKSPACE_BYTES) }?;
        let (workspace, guard) = memory.device_ptr(&stream);
        drop(guard);
        Ok(Self {
            handle,
            stream,
            workspace,
            _memory: memory,
            algorithms: Mutex::default(),
        })
    }

    /// The library's matrices are column-major: ours, transposed. So what it computes is
    /// `outputᵀ[outputs][rows] = weight[outputs][inputs] · inputᵀ[inputs][rows]`, where it sees
    /// the weight as `[inputs][outputs]`, to be transposed.
    pub(super) fn multiply(&self, product: Product) -> Result<(), DeviceError> {
        self.stream.context().bind_to_thread()?;
        let element = match product.dtype {
            KvDtype::F32 => sys::cudaDataType::CUDA_R_32F,
            KvDtype::F16 => sys::cudaDataType::CUDA_R_16F,
            KvDtype::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        let float = sys::cudaDataType::CUDA_R_32F;
        let (rows, inputs, outputs) = (product.rows, product.inputs, product.outputs);
        let weight = Layout::new(element, inputs, outputs)?;
        let input = Layout::new(element, inputs, rows)?;
        let output = Layout::new(float, outputs, rows)?;
        let description = Description::new()?;

        let shape = Shape {
            rows,
            inputs,
            outputs,
            dtype: product.dtype,
            accumulate: product.accumulate,
        };
        let known = self.algorithms.lock();
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        let algorithm = match known.get(&shape) {
            Some(algorithm) => *algorithm,
            None => {
                let preference = Preference::new()?;
                // SAFETY: all of them exist until the end of this function.
                let found = unsafe {
                    result::get_matmul_algo_heuristic(
                        self.handle.0,
                        description.0,
                        weight.0,
                        input.0,
                        output.0,
                        output.0,
                        preference.0,
                    )
                }?;
                // Prompts are of any length.
                if known.len() >= MOST_ALGORITHMS {
                    known.clear();
                }
                known.insert(shape, found.algo);
                found.algo
            }
        };
        let one = 1.0f32;
        let beta = if product.accumulate { 1.0f32 } else { 0.0 };
        // SAFETY:
        // - descriptions exist until the end of this function, which is as long as they are
        //   read; and so do the factors;
        // - the caller has the memory of the matrices, of the sizes that are described;
        // - the workspace is as large as the algorithm was chosen for, and used in the order
        //   of this stream alone.
        unsafe {
            result::matmul(
                self.handle.0,
                description.0,
                ptr::from_ref(&one).cast::<c_void>(),
                ptr::from_ref(&beta).cast::<c_void>(),
                product.weight as *const c_void,
                weight.0,
                product.input as *const c_void,
                input.0,
                product.output as *const c_void,
                output.0,
                product.output as *mut c_void,
                output.0,
                ptr::from_ref(&algorithm),
                self.workspace as *mut c_void,
                WORKSPACE_BYTES,
                self.stream.cu_stream().cast(),
            )
        }?;
        Ok(())
    }
}

/// NVIDIA's advice for Hopper; more than older devices want.
const WORKSPACE_BYTES: usize = 32 << 20;
const MOST_ALGORITHMS: usize = 4096;

/// A column-major matrix without gaps.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(element: sys::cudaDataType, rows: usize, columns: usize) -> Result<Self, CublasError> {
        let leading = i64::try_from(rows).unwrap_or(i64::MAX);
        result::create_matrix_layout(element, rows as u64, columns as u64, leading).map(Self)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        let destroyed = unsafe { result::destroy_matrix_layout(self.0) };
        debug_assert!(destroyed.is_ok(), "a layout that exists");
    }
}

/// A product whose first matrix is transposed, and whose sums are f32.
struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new() -> Result<Self, CublasError> {
        let float = sys::cudaDataType::CUDA_R_32F;
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let it = Self(result::create_matmul_desc(sums, float)?);
        // `CUBLAS_OP_T`.
        let transposed = 1i32;
        let which = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        // SAFETY: it exists, and the value is of the length that is given.
        unsafe {
            result::set_matmul_desc_attribute(
                it.0,
                which,
                ptr::from_ref(&transposed).cast::<c_void>(),
                size_of_val(&transposed),
            )
        }?;
        Ok(it)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        let destroyed = unsafe { result::destroy_matmul_desc(self.0) };
        debug_assert!(destroyed.is_ok(), "a description that exists");
    }
}

/// What an algorithm may use.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, CublasError> {
        let it = Self(result::create_matmul_pref()?);
        let which =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes = WORKSPACE_BYTES;
        // SAFETY: it exists, and the value is of the length that is given.
        unsafe {
            result::set_matmul_pref_attribute(
                it.0,
                which,
                ptr::from_ref(&bytes).cast::<c_void>(),
                size_of_val(&bytes),
            )
        }?;
        Ok(it)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: nobody else has it.
        let destroyed = unsafe { result::destroy_matmul_pref(self.0) };
        debug_assert!(destroyed.is_ok(), "a preference that exists");
    }
}
