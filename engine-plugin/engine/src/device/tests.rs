//! Kernels, layers and pages of a device beside the CPU's: in emulation, and on a GPU if there
//! is one.

mod fixtures;
mod kernels;
mod layers;
mod pages;

use std::sync::OnceLock;

use super::emulated::Emulated;
use super::*;

/// A device of its own, where copies are late or early.
fn emulated(prompt: Stream) -> Device {
    Device {
        machine: Emulated::start(prompt),
    }
}

/// A GPU, where there is one; the same for all tests, as its kernels take seconds to compile.
fn gpu() -> Option<Device> {
    static GPU: OnceLock<Option<Device>> = OnceLock::new();
    GPU.get_or_init(find_gpu).clone()
}

fn find_gpu() -> Option<Device> {
    match Device::cuda(0) {
        Ok(device) => Some(device),
        Err(
            error @ (DeviceUnavailable::Driver
            | DeviceUnavailable::Compiler
            | DeviceUnavailable::Products
            | DeviceUnavailable::Device { .. }),
        ) => {
            eprintln!("not tested on a GPU: {error}");
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// Each as a test of its own, in emulation and on a GPU.
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod emulated {
            $(
                #[test]
                fn $name() {
                    use crate::device::machine::Stream;
                    super::$name(&crate::device::tests::emulated(Stream::Compute));
                }
            )*
        }

        mod on_a_gpu {
            $(
                #[test]
                fn $name() {
                    if let Some(device) = crate::device::tests::gpu() {
                        super::$name(&device);
                    }
                }
            )*
        }
    };
}
use on_both;

/// Those that copy beside computing, in emulation where copies are early and computing is late.
macro_rules! also_late {
    ($($name:ident),* $(,)?) => {
        mod late_computing {
            $(
                #[test]
                fn $name() {
                    use crate::device::machine::Stream;
                    super::$name(&crate::device::tests::emulated(Stream::Copy));
                }
            )*
        }
    };
}
use also_late;

/// The largest difference; infinite where one is not a number.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let both = found.iter().zip(expected);
    let worst = both.map(|(a, b)| (a - b).abs());
    worst.fold(0.0, |worst, of| if of <= worst { worst } else { of })
}

/// Set where NVRTC must be found: its absence is then a failure.
const REQUIRED: &str = "KVASIR_REQUIRE_NVRTC";

#[test]
fn kernels_compile_for_every_device() {
    use kvasir_cuda::{compile_kernels, has_compiler, known_capabilities};

    if !has_compiler() {
        assert!(
            std::env::var_os(REQUIRED).is_none(),
            "{REQUIRED} is set, and there is no NVRTC"
        );
        eprintln!("NVRTC is not here: kernels were not compiled; try `make test-cuda`");
        return;
    }
    let known = known_capabilities().unwrap();
    assert!(known.len() > 1, "{known:?}");
    for capability in known {
        let image = compile_kernels(&launch::SOURCE, capability);
        if let Err(cudarc::nvrtc::CompileError::CompileError { log, .. }) = &image {
            panic!("{capability:?}: {}", log.to_string_lossy());
        }
        image.unwrap();
    }
    // Of next year: by PTX, which has every kernel by name.
    let (major, minor) = (99, 0);
    let capability = kvasir_cuda::ComputeCapability { major, minor };
    let text = compile_kernels(&launch::SOURCE, capability).unwrap();
    let text = text.to_src();
    for name in launch::KERNELS {
        assert!(text.contains(&format!(".entry {name}(")), "{name}");
    }
}

/// Where something is missing, it is said what.
#[test]
fn what_is_missing_is_said() {
    if let Err(error) = Device::cuda(0) {
        let text = error.to_string();
        let named = ["driver", "NVRTC", "cuBLASLt", "CUDA device 0"];
        assert!(named.iter().any(|name| text.contains(name)), "{text}");
    }
    let free = 1 << 30;
    let device = emulated(Stream::Compute);
    let config = layers::config("Llama", 2, 1, 64, None);
    let pool = DevicePool::new(&device, &config, 1 << 20, KvDtype::F32);
    match pool {
        Err(DevicePoolError::Unavailable(DeviceUnavailable::Memory {
            wanted,
            free: found,
        })) => assert!(found == free && wanted > free),
        other => panic!("{other:?}"),
    }
}
