//! An NVIDIA GPU, through its driver.
//!
//! Order between the two streams is ours to keep: addresses are taken once, when memory is
//! allocated, and the wrapper's own tracking of who reads and writes what is not used.

#![expect(
    unsafe_code,
    reason = "calls of NVIDIA's driver, which knows nothing of lifetimes"
)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute, CUevent_flags};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice, result,
};
use kvasir_cuda::{ComputeCapability, compile_kernels, has_compiler};

use super::launch::{KERNELS, Launch, SOURCE};
use super::machine::{Product, Stream};
use super::products::{Products, has_products};
use super::{DeviceError, DeviceUnavailable};

pub(super) use cudarc::driver::CudaEvent;

/// A GPU with two streams.
#[derive(Debug)]
pub(crate) struct Cuda {
    context: Arc<CudaContext>,
    compute: Arc<CudaStream>,
    copy: Arc<CudaStream>,
    kernels: HashMap<&'static str, CudaFunction>,
    products: Products,
    processors: usize,
}

/// Page-locked memory of the host.
#[derive(Debug)]
pub(super) struct CudaPinned {
    slice: PinnedHostSlice<u8>,
    bytes: usize,
}

impl Cuda {
    pub(super) fn new(ordinal: usize) -> Result<Self, DeviceUnavailable> {
        // SAFETY: looks for a library, which is NVIDIA's where it has this name.
        if !unsafe { sys::is_culib_present() } {
            return Err(DeviceUnavailable::Driver);
        }
        if !has_compiler() {
            return Err(DeviceUnavailable::Compiler);
        }
        if !has_products() {
            return Err(DeviceUnavailable::Products);
        }
        let failed = |source| DeviceUnavailable::Device { ordinal, source };
        let context = CudaContext::new(ordinal).map_err(failed)?;
        let (major, minor) = context.compute_capability().map_err(failed)?;
        let capability = ComputeCapability { major, minor };
        let image = compile_kernels(&SOURCE, capability)
            .map_err(|source| DeviceUnavailable::Kernels { capability, source })?;
        let module = context.load_module(image).map_err(failed)?;
        let mut kernels = HashMap::new();
        for name in KERNELS {
            kernels.insert(name, module.load_function(name).map_err(failed)?);
        }
        let compute = context.new_stream().map_err(failed)?;
        let copy = context.new_stream().map_err(failed)?;
        let products = Products::new(compute.clone()).map_err(|source| match source {
            DeviceError::Driver(source) => failed(source),
            source => DeviceUnavailable::ProductsFailed { source },
        })?;
        let processors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context.attribute(processors).map_err(failed)?;
        Ok(Self {
            context,
            compute,
            copy,
            kernels,
            products,
            processors: usize::try_from(processors).unwrap_or(1),
        })
    }

    fn stream(&self, stream: Stream) -> &Arc<CudaStream> {
        match stream {
            Stream::Compute => &self.compute,
            Stream::Copy => &self.copy,
        }
    }

    pub(super) fn name(&self) -> Result<String, DeviceError> {
        Ok(self.context.name()?)
    }

    pub(super) fn processors(&self) -> usize {
        self.processors
    }

    pub(super) fn free_bytes(&self) -> Result<u64, DeviceError> {
        let (free, _) = self.context.mem_get_info()?;
        Ok(free as u64)
    }

    pub(super) fn alloc(&self, bytes: usize) -> Result<(u64, CudaSlice<u8>), DeviceError> {
        // SAFETY: bytes may be anything, and nobody reads them before something was written.
        let slice = unsafe { self.compute.alloc::<u8>(bytes) }?;
        let (address, guard) = slice.device_ptr(&self.compute);
        drop(guard);
        // Allocated in the order of one stream, and used in both.
        self.compute.synchronize()?;
        Ok((address, slice))
    }

    pub(super) fn alloc_pinned(&self, bytes: usize) -> Result<CudaPinned, DeviceError> {
        // Cached by the CPU, as it is read too.
        let flags = 0;
        // SAFETY: bytes may be anything.
        let slice = unsafe {
            self.context
                .alloc_pinned_with_flags::<u8>(bytes.max(1), flags)
        }?;
        Ok(CudaPinned {
            slice,
            bytes: bytes.max(1),
        })
    }

    pub(super) fn fill_zero(&self, address: u64, bytes: usize) -> Result<(), DeviceError> {
        self.context.bind_to_thread()?;
        // SAFETY: the caller has that memory.
        unsafe { result::memset_d8_async(address, 0, bytes, self.compute.cu_stream()) }?;
        Ok(())
    }

    pub(super) fn upload(&self, address: u64, from: &[u8]) -> Result<(), DeviceError> {
        self.context.bind_to_thread()?;
        // SAFETY: the caller has that memory. `from` is pageable, so that the driver has copied
        // it when the call returns.
        unsafe { result::memcpy_htod_async(address, from, self.compute.cu_stream()) }?;
        Ok(())
    }

    pub(super) fn download(&self, address: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        self.context.bind_to_thread()?;
        // SAFETY: the caller has that memory, and the copy is waited for before `out` is given
        // back.
        unsafe { result::memcpy_dtoh_async(out, address, self.compute.cu_stream()) }?;
        self.compute.synchronize()?;
        Ok(())
    }

    pub(super) fn copy_in(
        &self,
        pinned: &CudaPinned,
        bytes: usize,
        address: u64,
    ) -> Result<(), DeviceError> {
        let from = &pinned.slice.as_slice()?[..bytes];
        self.context.bind_to_thread()?;
        // SAFETY: the caller has that memory, and leaves the pinned bytes alone until an event
        // of this stream says that they were copied.
        unsafe { result::memcpy_htod_async(address, from, self.copy.cu_stream()) }?;
        Ok(())
    }

    pub(super) fn copy_out(
        &self,
        address: u64,
        bytes: usize,
        pinned: &CudaPinned,
    ) -> Result<(), DeviceError> {
        assert!(bytes <= pinned.bytes, "copies end inside pinned memory");
        let to = pinned.slice.as_ptr()?.cast_mut();
        self.context.bind_to_thread()?;
        // SAFETY:
        // - the caller has the memory of the device;
        // - the pinned memory is as long as asserted, and was allocated to be written;
        // - nobody looks at it until an event of this stream says that it was written.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.cast::<c_void>(), address, bytes, self.copy.cu_stream())
        }
        .result()?;
        Ok(())
    }

    pub(super) fn launch(&self, stream: Stream, launch: Launch) -> Result<(), DeviceError> {
        let function = &self.kernels[launch.kernel];
        // Aligned as addresses in it are.
        let mut arguments = [0u64; MOST_ARGUMENTS];
        for (to, from) in arguments.iter_mut().zip(launch.arguments.as_chunks().0) {
            *to = u64::from_le_bytes(*from);
        }
        assert!(launch.arguments.len() <= size_of_val(&arguments));
        let mut parameters = [arguments.as_mut_ptr().cast::<c_void>()];
        self.context.bind_to_thread()?;
        // SAFETY:
        // - the kernel takes one structure, of the length and in the layout of `arguments`,
        //   which the driver copies before it returns;
        // - what its addresses point to is the caller's, who orders what uses it.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
                (launch.blocks, 1, 1),
                (launch.threads, 1, 1),
                launch.shared_bytes,
                self.stream(stream).cu_stream(),
                &mut parameters,
            )
        }?;
        Ok(())
    }

    pub(super) fn multiply(&self, product: Product) -> Result<(), DeviceError> {
        self.products.multiply(product)
    }

    pub(super) fn record(&self, stream: Stream) -> Result<CudaEvent, DeviceError> {
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING;
        Ok(self.stream(stream).record_event(Some(flags))?)
    }

    pub(super) fn wait(&self, stream: Stream, event: &CudaEvent) -> Result<(), DeviceError> {
        Ok(self.stream(stream).wait(event)?)
    }

    #[expect(clippy::unused_self, reason = "as the emulation has it")]
    pub(super) fn finish(&self, event: &CudaEvent) -> Result<(), DeviceError> {
        Ok(event.synchronize()?)
    }
}

/// Of the largest structure, in 8 bytes.
const MOST_ARGUMENTS: usize = 16;

impl CudaPinned {
    pub(super) fn write(&mut self, parts: &[&[u8]]) {
        let memory = self.slice.as_mut_slice();
        let mut rest = memory.expect("an event that was never recorded has passed");
        for part in parts {
            let (now, later) = rest.split_at_mut(part.len());
            now.copy_from_slice(part);
            rest = later;
        }
    }

    pub(super) fn read(&self, out: &mut [u8]) {
        let memory = self.slice.as_slice();
        let memory = memory.expect("an event that was never recorded has passed");
        out.copy_from_slice(&memory[..out.len()]);
    }
}
