//! Which of an engine's blocks a daemon has, as it tells.

use std::borrow::Cow;
use std::num::NonZeroUsize;

use kvasir_plugin::Change;
use pyo3::prelude::*;

use crate::identity::Namespace;

/// Blocks that an engine wants to be told about. See `kvasir_plugin::Residency`.
#[pyclass(frozen, module = "kvasir")]
#[derive(Debug)]
pub(crate) struct Residency {
    namespace: Namespace,
    of: kvasir_plugin::Residency<Vec<u8>>,
}

impl Residency {
    pub(crate) const fn new(namespace: Namespace, of: kvasir_plugin::Residency<Vec<u8>>) -> Self {
        Self { namespace, of }
    }
}

/// How many blocks are followed where nobody says.
pub(crate) const LIMIT: NonZeroUsize = NonZeroUsize::new(1 << 18).unwrap();

#[pymethods]
impl Residency {
    /// Asks to be told about blocks of these names.
    fn expect(&self, py: Python<'_>, names: Vec<Vec<u8>>) {
        py.detach(|| {
            let key = |name: Vec<u8>| (self.namespace.0.opaque(&name), name);
            self.of.expect(names.into_iter().map(key));
        });
    }

    /// What has become of them since this was called last, in order: a name, and whether the
    /// daemon has it.
    fn take(&self, py: Python<'_>) -> Vec<(Cow<'static, [u8]>, bool)> {
        let told = |change: Change<Vec<u8>>| match change {
            Change::Stored(name) => (name.into(), true),
            Change::Removed(name) => (name.into(), false),
        };
        py.detach(|| self.of.take().into_iter().map(told).collect())
    }

    /// Gives all of them up.
    fn clear(&self, py: Python<'_>) {
        py.detach(|| self.of.clear());
    }
}
