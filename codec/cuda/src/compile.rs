//! Compiling kernels for a device, at run time.

use std::ffi::{CStr, CString, c_char, c_int};

use cudarc::nvrtc::result::{
    NvrtcError, compile_program, create_program, destroy_program, get_program_log, get_ptx,
};
use cudarc::nvrtc::{CompileError, Ptx, sys};

/// Kernels in C++ that needs no headers, as this package and the engine have some.
#[derive(Clone, Copy, Debug)]
pub struct KernelSource {
    /// What the compiler's messages call it.
    pub name: &'static CStr,
    /// Without numbers.cu, which is put before it.
    pub text: &'static str,
    /// Options beside that of the device.
    pub options: &'static [&'static str],
}

/// The codec's kernel.
pub(crate) const DECODE: KernelSource = KernelSource {
    name: c"decode.cu",
    text: include_str!("decode.cu"),
    // Products are not added before they are rounded: the CPU does not either.
    options: &["--fmad=false", "--ftz=false"],
};

/// Element types and rounding to them, which all kernels share.
const NUMBERS: &str = include_str!("numbers.cu");

/// What a multiprocessor can do: major and minor version of its compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ComputeCapability {
    /// Generation.
    pub major: i32,
    /// Variant of it.
    pub minor: i32,
}

impl ComputeCapability {
    fn number(self) -> c_int {
        10 * self.major + self.minor
    }
}

/// Whether NVRTC is there to compile with.
pub fn has_compiler() -> bool {
    // SAFETY: looks for a library, which is NVIDIA's where it has this name.
    unsafe { sys::is_culib_present() }
}

/// Compiles kernels: to machine code where the compiler knows such devices, else to PTX
/// of the newest that it knows, which the driver compiles.
///
/// # Errors
/// The compiler knows no device as old as that, or fails.
///
/// # Panics
/// NVRTC is not [there](has_compiler).
pub fn compile_kernels(
    source: &KernelSource,
    capability: ComputeCapability,
) -> Result<Ptx, CompileError> {
    let known = architectures().map_err(CompileError::CreationError)?;
    let exact = known.contains(&capability.number());
    let options = if exact {
        vec![format!("--gpu-architecture=sm_{}", capability.number())]
    } else {
        let older = known.into_iter().filter(|&at| at < capability.number());
        let newest = older.max().unwrap_or(capability.number());
        vec![format!("--gpu-architecture=compute_{newest}")]
    };
    let own = source.options.iter().map(|&option| option.to_owned());
    let options: Vec<String> = options.into_iter().chain(own).collect();

    let program = Program::new(source)?;
    // SAFETY: the program exists, as long as it is not dropped.
    let compiled = unsafe { compile_program(program.handle, &options) };
    compiled.map_err(|nvrtc| CompileError::CompileError {
        nvrtc,
        options,
        log: program.log(),
    })?;
    if exact {
        let image = program.machine_code();
        image.map(Ptx::from_binary)
    } else {
        // SAFETY: as above; and it is compiled.
        let text = unsafe { get_ptx(program.handle) };
        text.map(|text| Ptx::from_src(to_c_string(&text).to_string_lossy()))
    }
    .map_err(CompileError::GetPtxError)
}

/// A program of NVRTC, and what it refers to.
struct Program {
    handle: sys::nvrtcProgram,
    _source: CString,
}

impl Program {
    fn new(source: &KernelSource) -> Result<Self, CompileError> {
        let text = [NUMBERS, "#line 1\n", source.text].concat();
        let text = CString::new(text).expect("kernels have no zeros");
        let handle = create_program(&text, Some(source.name));
        Ok(Self {
            handle: handle.map_err(CompileError::CreationError)?,
            _source: text,
        })
    }

    fn log(&self) -> CString {
        // SAFETY: the program exists, as long as `self`.
        let log = unsafe { get_program_log(self.handle) };
        to_c_string(&log.unwrap_or_default())
    }

    fn machine_code(&self) -> Result<Vec<u8>, NvrtcError> {
        let mut size = 0;
        // SAFETY: the program exists, as long as `self`.
        unsafe { sys::nvrtcGetCUBINSize(self.handle, &raw mut size) }.result()?;
        let mut image = vec![0u8; size];
        // SAFETY: as above; and there is room for so many bytes.
        unsafe { sys::nvrtcGetCUBIN(self.handle, image.as_mut_ptr().cast()) }.result()?;
        Ok(image)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: nobody else has the handle.
        let destroyed = unsafe { destroy_program(self.handle) };
        debug_assert!(destroyed.is_ok(), "a program that exists");
    }
}

/// The devices that the compiler makes machine code for.
///
/// # Errors
/// The compiler fails.
///
/// # Panics
/// NVRTC is not [there](has_compiler).
pub fn known_capabilities() -> Result<Vec<ComputeCapability>, NvrtcError> {
    let numbers = architectures()?.into_iter();
    let capability = |number| ComputeCapability {
        major: number / 10,
        minor: number % 10,
    };
    Ok(numbers.map(capability).collect())
}

/// The same, as 10 · major + minor.
fn architectures() -> Result<Vec<c_int>, NvrtcError> {
    let mut count = 0;
    // SAFETY: the pointer is to where the count goes.
    unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }.result()?;
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: there is room for so many.
    unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) }.result()?;
    Ok(known)
}

/// Up to the first zero.
fn to_c_string(text: &[c_char]) -> CString {
    let bytes: Vec<u8> = text.iter().flat_map(|byte| byte.to_le_bytes()).collect();
    CStr::from_bytes_until_nul(&bytes).map_or_else(|_| CString::default(), CStr::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Set where NVRTC must be found: its absence is then a failure.
    const REQUIRED: &str = "KVASIR_REQUIRE_NVRTC";

    #[test]
    fn the_kernel_compiles_for_every_device() {
        if !has_compiler() {
            assert!(
                std::env::var_os(REQUIRED).is_none(),
                "{REQUIRED} is set, and there is no NVRTC"
            );
            eprintln!("NVRTC is not here: the kernel was not compiled; try `make test-cuda`");
            return;
        }
        let known = known_capabilities().unwrap();
        assert!(known.len() > 1, "{known:?}");
        for &capability in &known {
            let image = compile_kernels(&DECODE, capability);
            if let Err(CompileError::CompileError { log, .. }) = &image {
                panic!("{capability:?}: {}", log.to_string_lossy());
            }
            image.unwrap();
        }
        // Of next year: by PTX of the newest that is known.
        let (major, minor) = (99, 0);
        let image = compile_kernels(&DECODE, ComputeCapability { major, minor }).unwrap();
        let newest = known.iter().max().unwrap().number();
        let text = image.to_src();
        assert!(text.contains(&format!(".target sm_{newest}")), "{text}");
        assert!(text.contains(".entry decode_cells"), "{text}");
        assert!(!text.contains("fma"), "every operation rounds");
        let (major, minor) = (1, 0);
        compile_kernels(&DECODE, ComputeCapability { major, minor }).unwrap_err();
    }
}
