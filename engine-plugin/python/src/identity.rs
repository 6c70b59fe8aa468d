//! What KV is, and how chunks of it are named.

use kvasir_types::{Adapter, ChunkKey, DType, KvLayout, ModelIdentity, Namespace as Names, Planes};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::invalid;

/// Longest row of what is opaque: a page.
const MAX_ROW: u16 = 4096;

/// Geometry of a chunk: `[layer, plane (K, V), kv_head, token, dim]`, row-major, little-endian.
/// Of latent attention, there is one plane.
#[pyclass(frozen, eq, hash, from_py_object, module = "kvasir")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Layout(pub(crate) KvLayout);

#[pymethods]
impl Layout {
    #[new]
    #[pyo3(signature = (*, layers, kv_heads, head_dim, tokens, dtype, planes = 2))]
    fn new(
        layers: u16,
        kv_heads: u16,
        head_dim: u16,
        tokens: u32,
        dtype: &str,
        planes: u8,
    ) -> PyResult<Self> {
        let known = DType::ALL.into_iter().find(|it| it.to_string() == dtype);
        let Some(dtype) = known else {
            let names = DType::ALL.map(|it| it.to_string()).join(", ");
            return Err(invalid(format!(
                "no element type is called {dtype}; there are {names}"
            )));
        };
        let planes = match planes {
            1 => Planes::Single { dim: head_dim },
            2 => Planes::symmetric(head_dim),
            _ => return Err(invalid(format!("KV has 1 plane or 2, not {planes}"))),
        };
        KvLayout::new(layers, kv_heads, planes, tokens, dtype)
            .map(Self)
            .map_err(invalid)
    }

    /// Of bytes that mean something to their writer alone: one layer of one plane, in rows of as
    /// many bytes as divide a page.
    #[staticmethod]
    fn opaque(bytes: u64) -> PyResult<Self> {
        let row = 1 << bytes.trailing_zeros().min(MAX_ROW.trailing_zeros());
        let rows = u32::try_from(bytes / u64::from(row)).unwrap_or(u32::MAX);
        let planes = Planes::Single { dim: row };
        // An element is a byte.
        KvLayout::new(1, 1, planes, rows, DType::F8E4m3)
            .map(Self)
            .map_err(invalid)
    }

    #[getter]
    fn layers(&self) -> u16 {
        self.0.layers()
    }

    #[getter]
    fn kv_heads(&self) -> u16 {
        self.0.kv_heads()
    }

    #[getter]
    fn tokens(&self) -> u32 {
        self.0.tokens()
    }

    #[getter]
    fn dtype(&self) -> String {
        self.0.dtype().to_string()
    }

    #[getter]
    fn layer_bytes(&self) -> usize {
        self.0.layer_bytes()
    }

    #[getter]
    fn chunk_bytes(&self) -> u64 {
        self.0.chunk_bytes()
    }

    fn __repr__(&self) -> String {
        format!(
            "Layout(layers={}, kv_heads={}, tokens={}, dtype={})",
            self.0.layers(),
            self.0.kv_heads(),
            self.0.tokens(),
            self.0.dtype()
        )
    }
}

/// Everything outside of the tokens that changes KV: model, adapter, layout, tokenizer, tenant.
#[pyclass(frozen, eq, hash, from_py_object, module = "kvasir")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Namespace(pub(crate) Names);

#[pymethods]
impl Namespace {
    #[new]
    #[pyo3(signature = (layout, *, architecture, weights, rope = "", adapter = None, tokenizer = None, salt = None))]
    fn new(
        layout: Layout,
        architecture: &str,
        weights: &str,
        rope: &str,
        adapter: Option<(String, String)>,
        tokenizer: Option<[u8; 32]>,
        salt: Option<&[u8]>,
    ) -> Self {
        let model = ModelIdentity {
            architecture: architecture.to_owned(),
            weights: weights.to_owned(),
            rope: rope.to_owned(),
        };
        let adapter = adapter.map(|(name, revision)| Adapter { name, revision });
        let tokenizer = tokenizer.unwrap_or_default();
        let salt = salt.unwrap_or_default();
        Self(Names::new(
            &model,
            adapter.as_ref(),
            layout.0,
            &tokenizer,
            salt,
        ))
    }

    #[getter]
    fn layout(&self) -> Layout {
        Layout(*self.0.layout())
    }

    #[getter]
    fn digest<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.as_bytes())
    }

    /// Keys of all whole prefix chunks of a sequence of token ids.
    fn prefix_keys<'py>(&self, py: Python<'py>, tokens: Vec<u32>) -> Vec<Bound<'py, PyBytes>> {
        let keys = py.detach(|| self.0.prefix_keys(&tokens));
        keys.iter()
            .map(|key| PyBytes::new(py, key.as_bytes()))
            .collect()
    }

    /// Key of a content chunk, which may stand anywhere.
    fn content_key<'py>(&self, py: Python<'py>, tokens: Vec<u32>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.content(&tokens).as_bytes())
    }

    /// Key of a chunk that an engine names itself, such as by its block hash.
    fn opaque_key<'py>(&self, py: Python<'py>, name: &[u8]) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.opaque(name).as_bytes())
    }
}

/// Keys as Python has them.
pub(crate) fn keys(keys: Vec<[u8; 32]>) -> Vec<ChunkKey> {
    keys.into_iter().map(ChunkKey::from_bytes).collect()
}
