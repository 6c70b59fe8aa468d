//! Running the kernel on a device.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{self, CUdevice_attribute, CUevent_flags};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, DevicePtrMut,
    DeviceRepr, DriverError, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::CompileError;
use kvasir_codec::DecodeTables;

use crate::batch::{Batch, BatchError, LANES, LayerJob};
use crate::compile::{ComputeCapability, DECODE, compile_kernels, has_compiler};

/// Decodes layers on one device, in one stream of its own.
///
/// The host reads and checks what comes before the symbols, and sends the rest of the encoded
/// bytes to the device, where one warp decodes each cell.
#[derive(Debug)]
pub struct CudaDecoder {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernel: CudaFunction,
    base: CudaSlice<u32>,
    thirds: CudaSlice<u32>,
    /// That run at once at most.
    warps: u32,
    /// Of all warps, between levels; grows to what batches need.
    numbers: CudaSlice<i16>,
}

/// Why there is no decoder on a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaUnavailable {
    /// There is no driver.
    #[error("no NVIDIA driver (libcuda.so.1); decode on the CPU, or install one")]
    Driver,
    /// There is no compiler for kernels.
    #[error(
        "no NVRTC (libnvrtc.so); install CUDA's, or `pip install nvidia-cuda-nvrtc-cu12` and name its lib folder in LD_LIBRARY_PATH"
    )]
    Compiler,
    /// There is no such device, or it does not answer.
    #[error("CUDA device {ordinal} cannot be used; see nvidia-smi, and CUDA_VISIBLE_DEVICES")]
    Device {
        /// Which.
        ordinal: usize,
        /// What the driver says.
        #[source]
        source: DriverError,
    },
    /// The kernel cannot be compiled for the device.
    #[error("the kernel does not compile for compute capability {}.{}", .capability.major, .capability.minor)]
    Kernel {
        /// Of the device.
        capability: ComputeCapability,
        /// What the compiler says.
        #[source]
        source: CompileError,
    },
}

/// Why layers were not decoded on a device. What their buffers hold is undefined then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaDecodeError {
    /// The layers or their places are at fault.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A buffer lies on another device.
    #[error("buffer {0} lies on another device than the decoder")]
    OtherDevice(usize),
    /// A buffer does not begin where one of the driver's does.
    #[error("buffer {0} does not begin at a multiple of {ALIGNMENT} bytes")]
    Alignment(usize),
    /// The device failed.
    #[error("the device failed")]
    Device(#[from] DriverError),
}

/// What decoding some layers took.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct CudaTimings {
    /// Cells, each decoded by a warp.
    pub cells: u32,
    /// Bytes that were sent to the device.
    pub sent_bytes: usize,
    /// Of the host: reading and checking.
    pub plan: Duration,
    /// Of the host: putting together what is sent.
    pub arrange: Duration,
    /// Until the bytes were on the device.
    pub send: Duration,
    /// Of the kernel alone, as the device measured it.
    pub kernel: Duration,
}

impl CudaDecoder {
    /// On the device of this number.
    ///
    /// # Errors
    /// There is no driver, no compiler or no such device.
    pub fn new(ordinal: usize) -> Result<Self, CudaUnavailable> {
        // SAFETY: looks for a library, which is NVIDIA's where it has this name.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaUnavailable::Driver);
        }
        if !has_compiler() {
            return Err(CudaUnavailable::Compiler);
        }
        let failed = |source| CudaUnavailable::Device { ordinal, source };
        let context = CudaContext::new(ordinal).map_err(failed)?;
        let (major, minor) = context.compute_capability().map_err(failed)?;
        let capability = ComputeCapability { major, minor };
        let image = compile_kernels(&DECODE, capability)
            .map_err(|source| CudaUnavailable::Kernel { capability, source })?;
        Self::with_image(context, image).map_err(failed)
    }

    fn with_image(
        context: Arc<CudaContext>,
        image: cudarc::nvrtc::Ptx,
    ) -> Result<Self, DriverError> {
        let kernel = context.load_module(image)?.load_function("decode_cells")?;
        let stream = context.new_stream()?;
        let tables = DecodeTables::current();
        let base = stream.clone_htod(&tables.base)?;
        let thirds = stream.clone_htod(&tables.thirds)?;
        let numbers = stream.alloc_zeros(1)?;
        let processors = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = u32::try_from(context.attribute(processors)?).unwrap_or(1);
        Ok(Self {
            warps: processors * WARPS_PER_PROCESSOR,
            context,
            stream,
            kernel,
            base,
            thirds,
            numbers,
        })
    }

    /// The stream that all work is in: buffers are allocated, filled and read in it.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// What the device is called.
    ///
    /// # Errors
    /// The device failed.
    pub fn device_name(&self) -> Result<String, DriverError> {
        self.context.name()
    }

    /// Decodes layers, each into one of `buffers`, and waits until all are done. Values are
    /// those of [`LayerCodec::decode`](kvasir_codec::LayerCodec::decode), bit for bit; of a key
    /// that is no number after it was turned, which one it is not.
    ///
    /// The more layers at once, the busier the device: a layer of 256 tokens and 8 heads of 128
    /// channels has 32 cells, and an H100 has 132 multiprocessors.
    ///
    /// # Errors
    /// A layer is damaged or has no place, or the device failed.
    pub fn decode_layers(
        &mut self,
        jobs: &[LayerJob<'_>],
        buffers: &mut [CudaSlice<u8>],
    ) -> Result<CudaTimings, CudaDecodeError> {
        let begin = Instant::now();
        let bytes: Vec<u64> = buffers.iter().map(|buffer| buffer.len() as u64).collect();
        let batch = Batch::new(jobs, &bytes)?;
        let plan = begin.elapsed();
        let timings = self.decode_batch(&batch, buffers)?;
        Ok(CudaTimings { plan, ..timings })
    }

    /// Decodes a batch that was made for such buffers.
    pub(crate) fn decode_batch(
        &mut self,
        batch: &Batch<'_>,
        buffers: &mut [CudaSlice<u8>],
    ) -> Result<CudaTimings, CudaDecodeError> {
        let other = |buffer: &CudaSlice<u8>| buffer.context() != &self.context;
        if let Some(at) = buffers.iter().position(other) {
            return Err(CudaDecodeError::OtherDevice(at));
        }
        if batch.cell_count() == 0 {
            return Ok(CudaTimings::default());
        }
        let stream = self.stream.clone();
        let mut guards = Vec::new();
        let mut addresses = Vec::new();
        for (at, buffer) in buffers.iter_mut().enumerate() {
            let (address, guard) = buffer.device_ptr_mut(&stream);
            if !address.is_multiple_of(ALIGNMENT as u64) {
                return Err(CudaDecodeError::Alignment(at));
            }
            addresses.push(address);
            guards.push(guard);
        }
        let begin = Instant::now();
        let (sent, places) = arrange(batch, &addresses);
        let arrange = begin.elapsed();

        let warps = self.warps.min(batch.cell_count());
        let wanted = warps as usize * batch.numbers_per_warp as usize;
        if self.numbers.len() < wanted {
            self.numbers = stream.alloc_zeros(wanted)?;
        }
        let blocks = warps / WARPS_PER_BLOCK;
        let config = if blocks == 0 {
            (1, warps)
        } else {
            (blocks, WARPS_PER_BLOCK)
        };
        let mut results = stream.alloc_zeros::<u32>(batch.layer_of_cell.len())?;

        let before = self.record()?;
        let input = stream.clone_htod(&sent)?;
        let arrived = self.record()?;
        {
            let (input, _input) = input.device_ptr(&stream);
            let (base, _base) = self.base.device_ptr(&stream);
            let (thirds, _thirds) = self.thirds.device_ptr(&stream);
            let (numbers, _numbers) = self.numbers.device_ptr_mut(&stream);
            let (results, _results) = results.device_ptr_mut(&stream);
            let arguments = Arguments {
                sections: places.map(|place| input + place),
                base,
                thirds,
                numbers,
                results,
                cell_count: batch.cell_count(),
                numbers_per_warp: batch.numbers_per_warp,
            };
            let config = LaunchConfig {
                grid_dim: (config.0, 1, 1),
                block_dim: (config.1 * LANES_OF_WARP, 1, 1),
                shared_mem_bytes: 0,
            };
            let mut launch = stream.launch_builder(&self.kernel);
            launch.arg(&arguments);
            // SAFETY:
            // - the arguments are those that the kernel takes, in its layout;
            // - what they point to lives until the end of this block, and is freed in the
            //   order of the stream;
            // - the batch says where each cell reads, and was made of sections as long as that;
            // - where a cell writes was checked against the buffers, which are borrowed;
            // - there is room for the numbers of as many warps as are launched.
            unsafe { launch.launch(config) }?;
        }
        drop(guards);
        let after = self.record()?;
        let results = stream.clone_dtoh(&results)?;
        stream.synchronize()?;
        batch.check(&results)?;
        Ok(CudaTimings {
            cells: batch.cell_count(),
            sent_bytes: sent.len(),
            plan: Duration::ZERO,
            arrange,
            send: elapsed(&before, &arrived)?,
            kernel: elapsed(&arrived, &after)?,
        })
    }

    fn record(&self) -> Result<CudaEvent, DriverError> {
        self.stream
            .record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))
    }
}

/// `Arguments` in decode.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Arguments {
    /// Those of the batch, then the destinations.
    sections: [u64; 12],
    base: u64,
    thirds: u64,
    numbers: u64,
    results: u64,
    cell_count: u32,
    numbers_per_warp: u32,
}

// As decode.cu asserts of its own.
const _: () = assert!(size_of::<Arguments>() == 17 * 8);

// SAFETY: integers only, laid out as in C, where the kernel has pointers of 64 bits.
unsafe impl DeviceRepr for Arguments {}

/// Everything that is sent, in one copy, and where each section lies in it.
fn arrange(batch: &Batch<'_>, destinations: &[u64]) -> (Vec<u8>, [u64; 12]) {
    let destinations: Vec<u8> = destinations
        .iter()
        .flat_map(|at| at.to_le_bytes())
        .collect();
    let sections = batch.sections();
    let mut sent = Vec::with_capacity(
        sections
            .iter()
            .map(|section| section.len() + ALIGNMENT)
            .sum::<usize>()
            + destinations.len(),
    );
    let mut places = [0; 12];
    let all = sections.into_iter().chain([&destinations[..]]);
    for (section, place) in all.zip(&mut places) {
        sent.resize(sent.len().next_multiple_of(ALIGNMENT), 0);
        *place = sent.len() as u64;
        sent.extend_from_slice(section);
    }
    (sent, places)
}

fn elapsed(from: &CudaEvent, to: &CudaEvent) -> Result<Duration, DriverError> {
    let milliseconds = from.elapsed_ms(to)?;
    Ok(Duration::from_secs_f32(milliseconds.max(0.0) / 1e3))
}

/// Enough to hide the latency of one behind the others, and few enough for what they keep
/// between levels, 32 KiB each, to stay in the cache.
const WARPS_PER_PROCESSOR: u32 = 16;
const WARPS_PER_BLOCK: u32 = 4;
const LANES_OF_WARP: u32 = 32;
/// Of sections and buffers: that of the widest load or store.
const ALIGNMENT: usize = 16;

const _: () = assert!(LANES == LANES_OF_WARP as usize, "a lane is a thread");
