//! What is known of a model, for chunks that are encoded with it.

use std::sync::Arc;

use bytes::Bytes;
use kvasir_types::KvLayout;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::data;
use crate::identity::Layout;
use crate::invalid;

/// What the keys and values of a model are like: chunks at levels `l0` to `l2` that are encoded
/// with it take fewer bytes, above all those of few tokens.
#[pyclass(frozen, eq, module = "kvasir")]
#[derive(Debug, PartialEq)]
pub(crate) struct Profile(pub(crate) Arc<kvasir_plugin::Profile>);

#[pymethods]
impl Profile {
    /// From the bytes of one.
    #[new]
    fn new(py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<Self> {
        let bytes = data::bytes(data)?;
        let parsed = py.detach(|| kvasir_plugin::Profile::parse(&bytes));
        Ok(Self(Arc::new(parsed.map_err(invalid)?)))
    }

    /// Learnt from chunks of a model, as they are put. Can take minutes for a large one.
    #[staticmethod]
    fn calibrate(py: Python<'_>, layout: Layout, chunks: Vec<Bound<'_, PyAny>>) -> PyResult<Self> {
        let sample = |chunk| layers(&layout.0, &data::bytes(chunk)?);
        let samples = chunks.iter().map(sample).collect::<PyResult<Vec<_>>>()?;
        let learnt = py.detach(|| kvasir_plugin::Profile::calibrate(&layout.0, &samples));
        Ok(Self(Arc::new(learnt.map_err(invalid)?)))
    }

    /// What chunks name it by.
    #[getter]
    fn digest<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.digest())
    }

    /// All of it, as a file has it.
    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.as_bytes())
    }

    fn __repr__(&self) -> String {
        format!("<profile of {} bytes>", self.0.as_bytes().len())
    }
}

/// The layers of a chunk.
pub(crate) fn layers(layout: &KvLayout, chunk: &Bytes) -> PyResult<Vec<Bytes>> {
    if chunk.len() as u64 != layout.chunk_bytes() {
        return Err(invalid(format!(
            "a chunk of this layout has {} bytes, the data {}",
            layout.chunk_bytes(),
            chunk.len()
        )));
    }
    let layer = layout.layer_bytes();
    let layers = 0..usize::from(layout.layers());
    Ok(layers
        .map(|at| chunk.slice(at * layer..(at + 1) * layer))
        .collect())
}
