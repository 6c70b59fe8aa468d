//! What a caller may say before each layer of a batch on a device.

use std::ops::Range;

use super::machine::{Machine, Memory};
use super::{DeviceError, DevicePool};
use crate::model::{Fate, Pages};

/// What a layer is about to attend with: [`BeforeLayer`](crate::BeforeLayer) of a device.
#[derive(Debug)]
pub struct BeforeDeviceLayer<'a> {
    /// Its index.
    pub layer: usize,
    /// Pages, which do not hold K and V of the rows yet.
    pub pool: &'a mut DevicePool,
    /// Projections after RoPE, on the device.
    pub rows: LayerRows<'a>,
    /// Position of each row in its sequence.
    pub positions: &'a [usize],
    /// Rows of each step.
    pub steps: &'a [Range<usize>],
    /// What becomes of each row; all go on until told otherwise. Rows whose logits are
    /// wanted go on in any case.
    pub fates: &'a mut [Fate],
    /// Which pages each step attends to in this layer; all until told otherwise.
    pub pages: &'a mut [Pages],
}

/// Projections of a layer's rows.
#[derive(Clone, Copy, Debug)]
pub struct LayerRows<'a> {
    pub(super) machine: &'a Machine,
    pub(super) memory: &'a Memory,
    pub(super) rows: usize,
    pub(super) stride: usize,
}

impl LayerRows<'_> {
    /// Elements from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// `[row][stride]`, of which the first `heads · head_dim` elements are the query heads, the
    /// next `kv_heads · head_dim` K and as many V. Waits for the device.
    ///
    /// # Errors
    ///
    /// The device failed.
    pub fn read(&self) -> Result<Vec<f32>, DeviceError> {
        let mut values = vec![0.0; self.rows * self.stride];
        let bytes = bytemuck::cast_slice_mut(&mut values);
        self.machine.download(self.memory, 0, bytes)?;
        Ok(values)
    }
}
