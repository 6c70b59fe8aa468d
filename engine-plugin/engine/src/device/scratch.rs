//! What a device keeps between kernels.

use std::sync::Arc;

use super::machine::{Machine, Memory};
use super::{Device, DeviceError, DeviceModel};

/// Memory of a device for activations. One for each thread that calls
/// [`DeviceModel::forward`]; it grows to the largest batch seen.
#[derive(Debug)]
pub struct DeviceScratch {
    pub(super) machine: Arc<Machine>,
    /// Residual stream, `[row][hidden]`, and where its rows are gathered.
    pub(super) stream: Buffer,
    pub(super) stream_kept: Buffer,
    /// `[row][hidden]`, of the weights' type.
    pub(super) normed: Buffer,
    /// `[row][qkv_width]`, and where its rows are gathered.
    pub(super) qkv: Buffer,
    pub(super) qkv_kept: Buffer,
    /// `[row][heads · head_dim]`, of the weights' type, and where its rows are gathered.
    pub(super) attended: Buffer,
    pub(super) attended_kept: Buffer,
    /// `[row][2 · intermediate]`.
    pub(super) gate_up: Buffer,
    /// `[row][intermediate]`, of the weights' type.
    pub(super) activated: Buffer,
    /// `[row][head_dim]`.
    pub(super) angles: Buffer,
    /// `[unit][partial_floats]`.
    pub(super) partial: Buffer,
    /// `[row][vocab]`.
    pub(super) logits: Buffer,
    /// Tokens of rows, later the largest logit of each.
    pub(super) tokens: Buffer,
    pub(super) positions: Buffer,
    /// Page tables of all steps.
    pub(super) blocks: Buffer,
    /// Where rows are appended.
    pub(super) places: Buffer,
    /// Which rows are gathered.
    pub(super) kept: Buffer,
    /// Lists, units and merges.
    pub(super) plan: Buffer,
}

/// Memory that grows.
#[derive(Debug, Default)]
pub(super) struct Buffer(Option<Memory>);

impl Buffer {
    /// At least so many bytes; what was there is lost when it grows.
    pub(super) fn ensure(&mut self, machine: &Machine, bytes: usize) -> Result<u64, DeviceError> {
        match &self.0 {
            Some(memory) if memory.bytes >= bytes => Ok(memory.address),
            _ => {
                // The old first, so that there is room.
                self.0 = None;
                let memory = machine.alloc(bytes)?;
                Ok(self.0.insert(memory).address)
            }
        }
    }

    pub(super) fn send(&mut self, machine: &Machine, words: &[u32]) -> Result<u64, DeviceError> {
        // Of powers of two, because contexts grow token by token.
        let bytes = size_of_val(words).next_power_of_two();
        let address = self.ensure(machine, bytes)?;
        machine.upload(self.memory(), 0, bytemuck::cast_slice(words))?;
        Ok(address)
    }

    pub(super) fn memory(&self) -> &Memory {
        self.0.as_ref().expect("what is used was made large enough")
    }

    pub(super) fn address(&self) -> u64 {
        self.memory().address
    }
}

impl DeviceScratch {
    /// Without memory; the first batches pay for it.
    pub fn new(device: &Device) -> Self {
        Self {
            machine: device.machine.clone(),
            stream: Buffer::default(),
            stream_kept: Buffer::default(),
            normed: Buffer::default(),
            qkv: Buffer::default(),
            qkv_kept: Buffer::default(),
            attended: Buffer::default(),
            attended_kept: Buffer::default(),
            gate_up: Buffer::default(),
            activated: Buffer::default(),
            angles: Buffer::default(),
            partial: Buffer::default(),
            logits: Buffer::default(),
            tokens: Buffer::default(),
            positions: Buffer::default(),
            blocks: Buffer::default(),
            places: Buffer::default(),
            kept: Buffer::default(),
            plan: Buffer::default(),
        }
    }

    pub(super) fn reserve(&mut self, model: &DeviceModel, rows: usize) -> Result<(), DeviceError> {
        let (config, element) = (&model.config, model.dtype.bytes());
        let attended = config.heads * config.head_dim;
        for (buffer, bytes) in [
            (&mut self.stream, 4 * config.hidden),
            (&mut self.stream_kept, 4 * config.hidden),
            (&mut self.normed, element * config.hidden),
            (&mut self.qkv, 4 * config.qkv_width()),
            (&mut self.qkv_kept, 4 * config.qkv_width()),
            (&mut self.attended, element * attended),
            (&mut self.attended_kept, element * attended),
            (&mut self.gate_up, 8 * config.intermediate),
            (&mut self.activated, element * config.intermediate),
            (&mut self.angles, 4 * config.head_dim),
        ] {
            buffer.ensure(&self.machine, rows * bytes)?;
        }
        Ok(())
    }
}
