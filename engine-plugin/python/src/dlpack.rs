//! Tensors of other libraries, seen without a copy, and bytes that they can see: DLPack
//! (<https://dmlc.github.io/dlpack/latest/python_spec.html>), versions 0 and 1.

use std::ffi::{CStr, c_void};
use std::ptr::{self, NonNull};

use bytes::Bytes;
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// `kDLCPU` and `kDLCUDAHost`, both memory of this machine.
const ON_HOST: [i32; 2] = [1, 3];
const UNSIGNED: u8 = 1;
const READ_ONLY: u64 = 1;
const VERSION: Version = Version { major: 1, minor: 0 };

const UNVERSIONED_NAME: &CStr = c"dltensor";
const VERSIONED_NAME: &CStr = c"dltensor_versioned";

#[repr(C)]
struct Version {
    major: u32,
    minor: u32,
}

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device_type: i32,
    device_id: i32,
    dimensions: i32,
    type_code: u8,
    type_bits: u8,
    type_lanes: u16,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLManagedTensor`, as far as it is read here.
#[repr(C)]
struct Unversioned {
    tensor: Tensor,
}

/// `DLManagedTensorVersioned`.
#[repr(C)]
struct Versioned {
    version: Version,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    flags: u64,
    tensor: Tensor,
}

/// A tensor that another library owns, which must not be changed as long as it is in use. Its
/// capsule is not taken over: it frees the tensor when it goes.
struct Given {
    _capsule: Py<PyAny>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the bytes are only read, and may be from any thread; the capsule is only kept.
unsafe impl Send for Given {}
// SAFETY: as above.
unsafe impl Sync for Given {}

impl AsRef<[u8]> for Given {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the tensor has these bytes and lives as long as its capsule. That nobody changes
        // it is the caller's promise; what is read is bytes, of which every value is valid.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

/// The bytes of a tensor, of whatever type.
///
/// # Errors
/// When it is no tensor, on a device, or not contiguous.
pub(crate) fn bytes(object: &Bound<'_, PyAny>) -> PyResult<Bytes> {
    let (device, _): (i32, i32) = object.call_method0("__dlpack_device__")?.extract()?;
    if !ON_HOST.contains(&device) {
        return Err(refused("the tensor is on a device: copy it to the CPU"));
    }
    let capsule = capsule(object)?;
    // SAFETY: a capsule of either name holds a pointer to the structure of that name, which stays
    // where it is as long as the capsule, and is not written to.
    let tensor = unsafe {
        if let Some(it) = pointer::<Versioned>(&capsule, VERSIONED_NAME) {
            let it = it.as_ref();
            if it.version.major != VERSION.major {
                return Err(refused("the tensor is of another version of DLPack"));
            }
            &it.tensor
        } else if let Some(it) = pointer::<Unversioned>(&capsule, UNVERSIONED_NAME) {
            &it.as_ref().tensor
        } else {
            return Err(refused("the tensor was given away before"));
        }
    };
    let len = len(tensor).ok_or_else(|| refused("the tensor has gaps: make it contiguous"))?;
    let offset =
        usize::try_from(tensor.byte_offset).map_err(|_| refused("the tensor is too big"))?;
    let start = NonNull::new(tensor.data.cast::<u8>().wrapping_add(offset));
    match start {
        Some(start) if len > 0 => Ok(Bytes::from_owner(Given {
            _capsule: capsule.unbind(),
            start,
            len,
        })),
        _ => Ok(Bytes::new()),
    }
}

/// A capsule with the tensor, of version 1 if its library knows that.
fn capsule<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let options = PyDict::new(object.py());
    options.set_item("max_version", (VERSION.major, VERSION.minor))?;
    let capsule = object.call_method("__dlpack__", (), Some(&options));
    match capsule {
        Err(error) if error.is_instance_of::<PyTypeError>(object.py()) => {
            object.call_method0("__dlpack__")
        }
        other => other,
    }
}

/// What a capsule holds, if it is of this name.
fn pointer<T>(capsule: &Bound<'_, PyAny>, name: &CStr) -> Option<NonNull<T>> {
    // SAFETY: both take any object, and a name that ends in 0; the pointer is asked for only if
    // the object is a capsule of this name.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule.as_ptr(), name.as_ptr()) == 0 {
            return None;
        }
        NonNull::new(ffi::PyCapsule_GetPointer(capsule.as_ptr(), name.as_ptr()).cast())
    }
}

/// Bytes of a tensor, if its elements follow each other.
fn len(tensor: &Tensor) -> Option<usize> {
    let dimensions = usize::try_from(tensor.dimensions).ok()?;
    let mut elements: i64 = 1;
    for at in (0..dimensions).rev() {
        // SAFETY: there are as many sizes as dimensions, and strides too if there are any.
        let (size, stride) = unsafe {
            let stride = (!tensor.strides.is_null()).then(|| *tensor.strides.add(at));
            (*tensor.shape.add(at), stride)
        };
        if size > 1 && stride.is_some_and(|stride| stride != elements) {
            return None;
        }
        elements = elements.checked_mul(size)?;
    }
    let bits = usize::from(tensor.type_bits) * usize::from(tensor.type_lanes);
    let bits = usize::try_from(elements).ok()?.checked_mul(bits)?;
    (bits % 8 == 0).then_some(bits / 8)
}

/// Bytes on their way to another library, and the tensor that says so.
struct Taken {
    tensor: Versioned,
    shape: [i64; 1],
    strides: [i64; 1],
    bytes: Bytes,
}

/// # Safety
///
/// `tensor` is the first field of a `Taken` that was leaked, and is not used again.
unsafe extern "C" fn free(tensor: *mut Versioned) {
    // SAFETY: said above; the context is the `Taken` itself.
    drop(unsafe { Box::from_raw((*tensor).context.cast::<Taken>()) });
}

/// # Safety
///
/// Called by the interpreter when a capsule of `tensor` goes.
unsafe extern "C" fn free_capsule(capsule: *mut ffi::PyObject) {
    // SAFETY: whoever takes the tensor over gives the capsule another name, and frees it.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, VERSIONED_NAME.as_ptr()) != 0 {
            free(ffi::PyCapsule_GetPointer(capsule, VERSIONED_NAME.as_ptr()).cast());
        }
    }
}

/// A capsule with these bytes, which cannot be changed.
///
/// # Errors
/// When whoever asks knows nothing of version 1, which alone can say so.
pub(crate) fn tensor(
    py: Python<'_>,
    bytes: &Bytes,
    max_version: Option<(u32, u32)>,
) -> PyResult<Py<PyAny>> {
    if max_version.is_none_or(|(major, _)| major < VERSION.major) {
        let text = "what cannot be changed is no tensor before DLPack 1.0: use the buffer protocol";
        return Err(refused(text));
    }
    let len = i64::try_from(bytes.len()).map_err(|_| refused("too many bytes for a tensor"))?;
    let mut taken = Box::new(Taken {
        tensor: Versioned {
            version: VERSION,
            context: ptr::null_mut(),
            deleter: Some(free),
            flags: READ_ONLY,
            tensor: Tensor {
                data: bytes.as_ptr().cast_mut().cast(),
                device_type: ON_HOST[0],
                device_id: 0,
                dimensions: 1,
                type_code: UNSIGNED,
                type_bits: 8,
                type_lanes: 1,
                shape: ptr::null_mut(),
                strides: ptr::null_mut(),
                byte_offset: 0,
            },
        },
        shape: [len],
        strides: [1],
        bytes: bytes.clone(),
    });
    debug_assert_eq!(
        taken.bytes.as_ptr(),
        bytes.as_ptr(),
        "a clone shares its bytes"
    );
    taken.tensor.tensor.shape = taken.shape.as_mut_ptr();
    taken.tensor.tensor.strides = taken.strides.as_mut_ptr();
    let taken = Box::into_raw(taken);
    // SAFETY: `taken` is valid, and from here on belongs to the capsule, or to nobody if there is
    // none, and is freed once.
    unsafe {
        (*taken).tensor.context = taken.cast();
        let tensor = &raw mut (*taken).tensor;
        let capsule =
            ffi::PyCapsule_New(tensor.cast(), VERSIONED_NAME.as_ptr(), Some(free_capsule));
        if capsule.is_null() {
            free(tensor);
        }
        Ok(Bound::from_owned_ptr_or_err(py, capsule)?.unbind())
    }
}

fn refused(text: &'static str) -> PyErr {
    PyBufferError::new_err(text)
}
