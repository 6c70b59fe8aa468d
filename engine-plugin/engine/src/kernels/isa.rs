//! Which instructions and how many threads.

use std::sync::{Arc, OnceLock};

/// An instruction set that this CPU has. Proof of detection: it cannot be made
/// for one that is absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

/// What kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Scalar code as the compiler makes it for the build's target.
    Portable,
    /// The same code, vectorised by the compiler for AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Hand-written AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The best one. Detected once.
    pub fn detect() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().unwrap_or(Self(Kind::Portable)))
    }

    /// All of them, best last.
    pub fn available() -> Vec<Self> {
        let mut kinds = vec![Self(Kind::Portable)];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            kinds.push(Self(Kind::Avx2));
            if is_x86_feature_detected!("avx512f") {
                kinds.push(Self(Kind::Avx512));
            }
        }
        kinds
    }

    pub(super) fn kind(self) -> Kind {
        self.0
    }
}

/// A pool of compute threads, shared by cloning.
#[derive(Clone, Debug)]
pub struct Threads(Arc<rayon::ThreadPool>);

impl Threads {
    /// A pool of `count` threads; 0 means one per available core.
    ///
    /// # Errors
    ///
    /// When the operating system refuses a thread.
    pub fn new(count: usize) -> Result<Self, rayon::ThreadPoolBuildError> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(count)
            .thread_name(|index| format!("kvasir-compute-{index}"))
            .build()?;
        Ok(Self(Arc::new(pool)))
    }

    /// Number of threads.
    pub fn count(&self) -> usize {
        self.0.current_num_threads()
    }

    /// Runs `work` on the pool and waits for it; parallel loops inside it use
    /// the pool's threads.
    pub(crate) fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.0.install(work)
    }
}

/// Defines `$name`, which runs the inlined `$body` compiled for the given
/// instruction set, so that the compiler vectorises it accordingly.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        $vis fn $name(isa: $crate::kernels::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) {
                $body($($arg),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx2,fma")]
            fn avx512($($arg: $ty),*) {
                $body($($arg),*);
            }
            match isa.kind() {
                $crate::kernels::isa::Kind::Portable => $body($($arg),*),
                // SAFETY: an `Isa` of this kind exists only after detection.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::isa::Kind::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: an `Isa` of this kind exists only after detection.
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::isa::Kind::Avx512 => unsafe { avx512($($arg),*) },
            }
        }
    };
}
pub(super) use dispatch;
