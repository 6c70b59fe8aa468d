//! Bytes that came from a daemon, seen by Python without a copy.

use std::ffi::c_int;

use bytes::Bytes;
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::dlpack;

/// Bytes that cannot be changed. Has the buffer protocol and DLPack: `memoryview`,
/// `numpy.frombuffer`, `torch.frombuffer` and `torch.from_dlpack` take it as it is.
#[pyclass(frozen, module = "kvasir")]
#[derive(Debug)]
pub(crate) struct Data(pub(crate) Bytes);

#[pymethods]
impl Data {
    fn __len__(&self) -> usize {
        self.0.len()
    }

    /// # Safety
    ///
    /// Called by the interpreter, with a view to fill.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill"));
        }
        let bytes = &slf.get().0;
        let length = ffi::Py_ssize_t::try_from(bytes.len())
            .map_err(|_| PyBufferError::new_err("too many bytes for a view"))?;
        // SAFETY: the view is the interpreter's. The bytes live as long as `slf`, to which the
        // view holds a reference, and are never changed: the view is read-only, and a request
        // for one that can be written is refused.
        let filled = unsafe {
            ffi::PyBuffer_FillInfo(
                view,
                slf.as_ptr(),
                bytes.as_ptr().cast_mut().cast(),
                length,
                1,
                flags,
            )
        };
        if filled == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }

    /// A tensor of bytes, for libraries that know DLPack 1.0.
    #[pyo3(signature = (*, stream = None, max_version = None, dl_device = None, copy = None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<Bound<'_, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        if dl_device.is_some_and(|device| device != self.__dlpack_device__()) || copy == Some(true)
        {
            let text = "the bytes are on the CPU and are not copied: ask for nothing else";
            return Err(PyBufferError::new_err(text));
        }
        // Of devices alone.
        drop(stream);
        dlpack::tensor(py, &self.0, max_version)
    }

    #[expect(clippy::unused_self, reason = "a method by its protocol")]
    fn __dlpack_device__(&self) -> (i32, i32) {
        (1, 0)
    }

    fn __repr__(&self) -> String {
        format!("<{} bytes>", self.0.len())
    }
}

/// Bytes that Python owns, which must not be changed as long as they are in use.
pub(crate) struct Given(PyUntypedBuffer);

impl AsRef<[u8]> for Given {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the buffer is contiguous, as `bytes` has checked, and stays where it is as long
        // as it is exported, which it is until this is dropped. That nobody changes it is the
        // caller's promise; what is read is bytes, of which every value is valid.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast(), self.0.len_bytes()) }
    }
}

/// The bytes of a buffer or of a tensor (DLPack), of whatever type, without a copy.
pub(crate) fn bytes(object: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    // SAFETY: takes any object.
    let is_buffer = unsafe { ffi::PyObject_CheckBuffer(object.as_ptr()) } != 0;
    if !is_buffer && object.hasattr("__dlpack__")? {
        return dlpack::bytes(object);
    }
    let buffer = PyUntypedBuffer::get(object)?;
    if !buffer.is_c_contiguous() {
        return Err(PyBufferError::new_err(
            "the buffer has gaps: make it contiguous",
        ));
    }
    if buffer.len_bytes() == 0 {
        return Ok(Bytes::new());
    }
    Ok(Bytes::from_owner(Given(buffer)))
}
