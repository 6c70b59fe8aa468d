//! Buffers between the host and pages.

use std::sync::Arc;

use super::DeviceError;
use super::machine::{Event, Machine, Memory, Pinned, Stream};

/// Two buffers, used by turns: the host fills one while the other is copied.
#[derive(Debug)]
pub(super) struct Staging {
    machine: Arc<Machine>,
    slots: [Slot; 2],
    next: usize,
}

/// Page-locked memory, and as much on the device.
#[derive(Debug, Default)]
struct Slot {
    buffers: Option<Buffers>,
    /// After the last work that uses them.
    busy: Option<Event>,
}

#[derive(Debug)]
pub(super) struct Buffers {
    pub(super) pinned: Pinned,
    pub(super) memory: Memory,
}

impl Staging {
    pub(super) fn new(machine: Arc<Machine>) -> Self {
        Self {
            machine,
            slots: Default::default(),
            next: 0,
        }
    }

    /// Does something in the stream of copies with buffers of at least so many bytes, that
    /// nothing else uses. They are used again when what was asked of the stream is done.
    pub(super) fn with(
        &mut self,
        bytes: usize,
        ask: impl FnOnce(&Machine, &mut Buffers) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        self.next = (self.next + 1) % self.slots.len();
        let slot = &mut self.slots[self.next];
        if let Some(busy) = slot.busy.take() {
            self.machine.finish(&busy)?;
        }
        let large_enough = |buffers: &Buffers| buffers.memory.bytes >= bytes;
        if !slot.buffers.as_ref().is_some_and(large_enough) {
            // The old ones first, so that there is room.
            slot.buffers = None;
            let bytes = bytes.next_power_of_two().max(LEAST_BYTES);
            slot.buffers = Some(Buffers {
                pinned: self.machine.alloc_pinned(bytes)?,
                memory: self.machine.alloc(bytes)?,
            });
        }
        let buffers = slot.buffers.as_mut().expect("they were just allocated");
        let asked = ask(&self.machine, buffers);
        // A part may be under way even then.
        slot.busy = Some(self.machine.record(Stream::Copy)?);
        asked
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for busy in self.slots.iter_mut().filter_map(|slot| slot.busy.take()) {
            // A device that failed copies nothing any more.
            self.machine.finish(&busy).ok();
        }
    }
}

/// A layer of 256 tokens of a model of 8 KV heads with 128 channels, in 16 bits.
const LEAST_BYTES: usize = 1 << 20;
