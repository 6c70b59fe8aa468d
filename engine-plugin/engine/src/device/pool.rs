//! Paged KV in the memory of a device.

use std::slice;
use std::sync::{Arc, Mutex, PoisonError};

use kvasir_cuda::{CudaDecoder, CudaTimings, LayerCodec, LayerJob, Placement, PlanePlacement};
use kvasir_types::{DType, Plane as KvPlane};

use super::launch::{Launch, Move, narrow};
use super::machine::{Event, Machine, Memory, Stream};
use super::staging::Staging;
use super::{Device, DeviceError, DevicePoolError};
use crate::config::ModelConfig;
use crate::kv::{BLOCK_TOKENS, BlockId, FreeBlocks, Geometry, KvDtype, KvError, Plane};

/// A fixed number of pages on a device, in the order of [`KvPool`](crate::KvPool) and with the
/// same page tables.
///
/// Copies are in a stream of their own. Those that bring a layer return before it is there, and
/// the layer waits for it on the device; those that read one return with it.
#[derive(Debug)]
pub struct DevicePool {
    machine: Arc<Machine>,
    geometry: Geometry,
    blocks: FreeBlocks,
    /// By layer, after what was landed last.
    landed: Vec<Option<Event>>,
    /// By layer, after what computed with it last.
    computed: Vec<Option<Event>>,
    /// Before the pages, so that it is done with them when they go.
    staging: Mutex<Staging>,
    memory: Memory,
}

/// A layer to decode into pages.
#[derive(Clone, Copy, Debug)]
pub struct EncodedLayer<'a> {
    /// Of the layer's chunk; without a profile.
    pub codec: &'a LayerCodec<'a>,
    /// The base, and any number of refinements in order.
    pub parts: &'a [&'a [u8]],
    /// The sequence's page table.
    pub blocks: &'a [BlockId],
    /// Where the chunk begins: with a page.
    pub first_token: usize,
    /// Which layer.
    pub layer: usize,
}

impl DevicePool {
    /// `blocks` pages for a model, zeroed.
    ///
    /// # Errors
    ///
    /// There is no room for them, or the device failed.
    ///
    /// # Panics
    ///
    /// With more than `u32::MAX` blocks.
    pub fn new(
        device: &Device,
        config: &ModelConfig,
        blocks: usize,
        dtype: KvDtype,
    ) -> Result<Self, DevicePoolError> {
        let geometry = Geometry::new(config, blocks, dtype);
        device.check_room(geometry.bytes() as u64)?;
        let machine = device.machine.clone();
        let memory = machine.alloc(geometry.bytes())?;
        machine.fill_zero(&memory)?;
        let zeroed = || machine.record(Stream::Compute).map(Some);
        Ok(Self {
            geometry,
            blocks: FreeBlocks::new(blocks),
            landed: (0..geometry.layers).map(|_| None).collect(),
            computed: (0..geometry.layers)
                .map(|_| zeroed())
                .collect::<Result<_, _>>()?,
            staging: Mutex::new(Staging::new(machine.clone())),
            memory,
            machine,
        })
    }

    /// Takes a free page. `None` when there is none. Its contents are stale.
    pub fn alloc(&mut self) -> Option<BlockId> {
        self.blocks.alloc()
    }

    /// Gives a page back.
    ///
    /// # Errors
    ///
    /// [`KvError::NotAllocated`] when it is not taken.
    pub fn free(&mut self, block: BlockId) -> Result<(), KvError> {
        self.blocks.free(block)
    }

    /// Pages not taken.
    pub fn free_blocks(&self) -> usize {
        self.blocks.count()
    }

    /// All pages.
    pub fn blocks(&self) -> usize {
        self.geometry.blocks
    }

    /// Element type.
    pub fn dtype(&self) -> KvDtype {
        self.geometry.dtype
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> u64 {
        self.geometry.bytes() as u64
    }

    /// Bytes of one layer of `tokens` tokens in canonical order.
    pub fn layer_bytes(&self, tokens: usize) -> usize {
        self.geometry.layer_bytes(tokens)
    }

    /// All bytes of the pages, after all copies.
    #[cfg(test)]
    pub(super) fn download(&self) -> Result<Vec<u8>, DeviceError> {
        self.finish_copies()?;
        let mut bytes = vec![0; self.geometry.bytes()];
        self.machine.download(&self.memory, 0, &mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Where a layer begins on the device.
    pub(super) fn layer_address(&self, layer: usize) -> u64 {
        self.memory.address + self.layer_offset(layer) as u64
    }

    fn layer_offset(&self, layer: usize) -> usize {
        self.geometry.offset(layer, BlockId(0), Plane::K, 0)
    }

    /// Has computing wait for what was landed in a layer.
    pub(super) fn before_computing(&mut self, layer: usize) -> Result<(), DeviceError> {
        match self.landed[layer].take() {
            Some(landed) => self.machine.wait(Stream::Compute, &landed),
            None => Ok(()),
        }
    }

    /// Has what lands in a layer from here on, or reads it, wait for what was computed.
    pub(super) fn after_computing(&mut self, layer: usize) -> Result<(), DeviceError> {
        self.computed[layer] = Some(self.machine.record(Stream::Compute)?);
        Ok(())
    }

    /// Lands one layer of tokens `first_token..first_token + tokens` of a sequence whose whole
    /// page table is `blocks`, as [`KvPool::write_layer`](crate::KvPool::write_layer). Returns
    /// when the payload has been taken: it waits for the copy before the last.
    ///
    /// # Errors
    ///
    /// The payload or the range does not fit, and nothing is written then; or the device failed.
    pub fn write_layer(
        &mut self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layer: usize,
        payload: &[u8],
    ) -> Result<(), DevicePoolError> {
        let geometry = &self.geometry;
        geometry.check(blocks, first_token, tokens, layer, payload.len())?;
        let table = table_bytes(blocks);
        let staging = self.staging.get_mut();
        let staging = staging.unwrap_or_else(PoisonError::into_inner);
        let pool = self.memory.address + geometry.offset(layer, BlockId(0), Plane::K, 0) as u64;
        let computed = &self.computed[layer];
        let bytes = table.len() + payload.len();
        staging.with(bytes, |machine, buffers| {
            buffers.pinned.write(&[&table, payload]);
            machine.copy_in(&buffers.pinned, bytes, &buffers.memory)?;
            // Others than the layer's readers need not have come that far.
            if let Some(computed) = computed {
                machine.wait(Stream::Copy, computed)?;
            }
            let at = buffers.memory.address;
            let launch = mover(geometry, pool, at, table.len(), first_token, tokens, true);
            machine.launch(Stream::Copy, launch)
        })?;
        self.landed[layer] = Some(self.machine.record(Stream::Copy)?);
        Ok(())
    }

    /// Waits for all that is being landed.
    ///
    /// # Errors
    ///
    /// The device failed.
    pub fn finish_copies(&self) -> Result<(), DeviceError> {
        self.machine.finish(&self.machine.record(Stream::Copy)?)
    }

    /// The inverse of [`Self::write_layer`]. Waits for what computes with the layer, and for
    /// the copy.
    ///
    /// # Errors
    ///
    /// The buffer or the range does not fit, or the device failed.
    pub fn read_layer(
        &self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layer: usize,
        out: &mut [u8],
    ) -> Result<(), DevicePoolError> {
        let geometry = &self.geometry;
        geometry.check(blocks, first_token, tokens, layer, out.len())?;
        let table = table_bytes(blocks);
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        let pool = self.layer_address(layer);
        let bytes = table.len() + out.len();
        staging.with(bytes, |machine, buffers| {
            buffers.pinned.write(&[&table]);
            machine.copy_in(&buffers.pinned, table.len(), &buffers.memory)?;
            if let Some(computed) = &self.computed[layer] {
                machine.wait(Stream::Copy, computed)?;
            }
            let at = buffers.memory.address;
            let launch = mover(geometry, pool, at, table.len(), first_token, tokens, false);
            machine.launch(Stream::Copy, launch)?;
            machine.copy_out(&buffers.memory, table.len(), out.len(), &buffers.pinned)?;
            machine.finish(&machine.record(Stream::Copy)?)?;
            buffers.pinned.read(out);
            Ok(())
        })?;
        Ok(())
    }

    /// Where the codec's decoder puts a layer of tokens that begin with a page.
    ///
    /// # Errors
    ///
    /// The range does not fit, or begins inside a page.
    pub fn placement(
        &self,
        blocks: &[BlockId],
        first_token: usize,
        tokens: usize,
        layer: usize,
    ) -> Result<Placement, DevicePoolError> {
        let geometry = &self.geometry;
        let bytes = geometry.layer_bytes(tokens);
        geometry.check(blocks, first_token, tokens, layer, bytes)?;
        if !first_token.is_multiple_of(BLOCK_TOKENS) {
            return Err(DevicePoolError::FirstToken(first_token));
        }
        let last = (first_token + tokens).div_ceil(BLOCK_TOKENS);
        let pages = blocks[first_token / BLOCK_TOKENS..last].iter();
        let plane_bytes = geometry.plane_bytes() as u64;
        let heads = geometry.kv_heads as u64 * plane_bytes;
        let keys = PlanePlacement {
            start: self.layer_offset(layer) as u64,
            page_stride: 2 * heads,
            token_stride: geometry.row_bytes() as u64,
            head_stride: plane_bytes,
        };
        Ok(Placement {
            page_tokens: narrow(BLOCK_TOKENS),
            pages: pages.map(|block| block.0).collect(),
            keys,
            values: PlanePlacement {
                start: keys.start + heads,
                ..keys
            },
        })
    }

    /// Tokens of a chunk, if it has the shape of the pages.
    pub(super) fn check_encoded(&self, codec: &LayerCodec<'_>) -> Option<usize> {
        let (layout, geometry) = (codec.layout(), &self.geometry);
        let dtype = match geometry.dtype {
            KvDtype::F32 => DType::F32,
            KvDtype::Bf16 => DType::Bf16,
            KvDtype::F16 => DType::F16,
        };
        let tokens = layout.tokens() as usize;
        let head_bytes = tokens * geometry.row_bytes();
        let fits = layout.dtype() == dtype
            && usize::from(layout.kv_heads()) == geometry.kv_heads
            && layout.head_bytes(KvPlane::Key) == head_bytes
            && layout.head_bytes(KvPlane::Value) == head_bytes;
        fits.then_some(tokens)
    }

    /// Decodes layers into pages, on the device, and waits until that is done. Only encoded
    /// bytes are sent. `decoder` must be of the same device.
    ///
    /// # Errors
    ///
    /// A layer is damaged or does not fit, or the device failed. What pages of the layers' tokens
    /// hold is undefined if it failed to decode.
    pub fn decode_layers(
        &mut self,
        decoder: &mut CudaDecoder,
        layers: &[EncodedLayer<'_>],
    ) -> Result<CudaTimings, DevicePoolError> {
        let placements = layers
            .iter()
            .enumerate()
            .map(|(index, it)| {
                let tokens = self.check_encoded(it.codec);
                let tokens = tokens.ok_or(DevicePoolError::Shape(index))?;
                self.placement(it.blocks, it.first_token, tokens, it.layer)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let jobs: Vec<LayerJob<'_>> = layers
            .iter()
            .zip(&placements)
            .map(|(it, placement)| LayerJob {
                codec: it.codec,
                parts: it.parts,
                placement,
                buffer: 0,
            })
            .collect();
        // The decoder's stream knows nothing of ours.
        for layer in layers {
            let events = [&self.computed[layer.layer], &self.landed[layer.layer]];
            for event in events.into_iter().flatten() {
                self.machine.finish(event)?;
            }
        }
        let memory = self.memory.as_cuda().ok_or(DevicePoolError::NotOnGpu)?;
        Ok(decoder.decode_layers(&jobs, slice::from_mut(memory))?)
    }
}

fn table_bytes(blocks: &[BlockId]) -> Vec<u8> {
    let blocks = blocks.iter();
    blocks.flat_map(|block| block.0.to_le_bytes()).collect()
}

/// Between a layer of the pool, and a page table with the payload behind it.
fn mover(
    geometry: &Geometry,
    pool: u64,
    table: u64,
    table_bytes: usize,
    first_token: usize,
    tokens: usize,
    into_pages: bool,
) -> Launch {
    let bytes = geometry.layer_bytes(tokens);
    let arguments = Move {
        pool,
        payload: table + table_bytes as u64,
        blocks: table,
        first_token: narrow(first_token),
        tokens: narrow(tokens),
        kv_heads: narrow(geometry.kv_heads),
        // Heads have an even number of channels.
        row_words: narrow(geometry.row_bytes() / 4),
        into_pages: into_pages.into(),
    };
    Launch::elements("move", bytes / 4, arguments.to_bytes())
}
