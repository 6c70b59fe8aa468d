//! Memory of an engine.

use std::sync::Arc;

use bytes::Bytes;
use kvasir_plugin::{Memory, OutsideMemory};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;

/// A layer's memory, which an engine reads and writes too: never the same blocks at the same
/// time, which is the contract between engines and their connectors.
#[derive(Debug)]
pub(crate) struct Region(PyUntypedBuffer);

impl Region {
    /// # Errors
    /// When it is no buffer, cannot be written, or has gaps.
    pub(crate) fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(object)?;
        if buffer.readonly() || !buffer.is_c_contiguous() {
            let text = "a layer's memory must be one buffer that can be written";
            return Err(PyBufferError::new_err(text));
        }
        Ok(Self(buffer))
    }

    /// Where some bytes are, if they are in it.
    fn at(&self, at: usize, len: usize) -> Result<*mut u8, OutsideMemory> {
        let end = at.checked_add(len);
        if end.is_none_or(|end| end > self.0.len_bytes()) {
            return Err(OutsideMemory { at });
        }
        Ok(self.0.buf_ptr().cast::<u8>().wrapping_add(at))
    }

    /// Bytes of it without a copy, which hold `until` as long as any of them is in use. Whoever
    /// calls this promises that nobody writes there before `until` is dropped.
    ///
    /// # Errors
    /// When they do not lie in it.
    pub(crate) fn lend<T: Send + Sync + 'static>(
        self: &Arc<Self>,
        at: usize,
        len: usize,
        until: T,
    ) -> Result<Bytes, OutsideMemory> {
        self.at(at, len)?;
        let region = Arc::clone(self);
        Ok(Bytes::from_owner(Lent {
            region,
            at,
            len,
            _until: until,
        }))
    }
}

/// Bytes of a region that stay as they are.
struct Lent<T> {
    region: Arc<Region>,
    at: usize,
    len: usize,
    _until: T,
}

impl<T> AsRef<[u8]> for Lent<T> {
    fn as_ref(&self) -> &[u8] {
        let from = self.region.0.buf_ptr().cast::<u8>().wrapping_add(self.at);
        // SAFETY: `lend` checked that the range lies in the buffer, which stays where it is as
        // long as it is exported. Nobody writes there before `until` is dropped, and that is
        // after this, by the promise of who called `lend`; every value of a byte is valid.
        unsafe { std::slice::from_raw_parts(from, self.len) }
    }
}

impl Memory for Region {
    fn len(&self) -> usize {
        self.0.len_bytes()
    }

    fn read(&self, at: usize, into: &mut [u8]) -> Result<(), OutsideMemory> {
        let from = self.at(at, into.len())?;
        // SAFETY: the range lies in the buffer, which stays where it is as long as it is exported.
        // `into` is Rust's own and cannot overlap it.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn write(&self, at: usize, from: &[u8]) -> Result<(), OutsideMemory> {
        let to = self.at(at, from.len())?;
        // SAFETY: as above; no reference to these bytes exists in Rust, only this pointer.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
        Ok(())
    }
}
