//! One batch of steps through all layers, on a device.

use std::ops::ControlFlow;

use super::attention::{
    Plan, Queries, Shape, partial_floats, row_kernel, row_shared, tile_kernel, tile_shared,
};
use super::launch::{
    Activate, AddBias, Angles, Append, Argmax, Attend, Embed, Gather, Heads, LANES, Launch, Merge,
    Norm, ROW_THREADS, narrow, type_number,
};
use super::machine::{Machine, Memory, Product, Stream};
use super::scratch::{Buffer, DeviceScratch};
use super::weights::{DeviceLayer, DeviceLinear};
use super::{BeforeDeviceLayer, DeviceError, DeviceModel, DevicePool, LayerRows};
use crate::kv::BLOCK_TOKENS;
use crate::model::{Fate, ForwardError, Logits, Pages, Rows, Step, check};

impl DeviceModel {
    /// Runs all `steps` as one batch and writes their K and V into the pages, as
    /// [`Model::forward`](crate::Model::forward) does. Returns when that is done.
    ///
    /// `before_layer` is called when the layers before have been asked of the device, which may
    /// be far behind: what it lands is copied while the device computes.
    ///
    /// Steps must not write to one page twice.
    ///
    /// # Errors
    ///
    /// [`ForwardError::Stopped`] when `before_layer` broke off, [`ForwardError::Device`] when
    /// the device failed; any other [`ForwardError`] when a step does not fit model or pages,
    /// and nothing is written then.
    pub fn forward(
        &self,
        pool: &mut DevicePool,
        scratch: &mut DeviceScratch,
        steps: &[Step<'_>],
        before_layer: &mut dyn FnMut(BeforeDeviceLayer<'_>) -> ControlFlow<()>,
    ) -> Result<Logits, ForwardError> {
        let (rows, wanted) = self.run(pool, scratch, steps, before_layer)?;
        let vocab = self.config.vocab_size;
        let mut values = vec![0.0; wanted * vocab];
        if wanted == 0 {
            self.settle()?;
        } else {
            let bytes = bytemuck::cast_slice_mut(&mut values);
            self.machine.download(scratch.logits.memory(), 0, bytes)?;
        }
        Ok(Logits::new(vocab, values, &rows))
    }

    /// The same; gives the token of the largest logit of each row of each step, the first one of
    /// equals, instead of logits. `None` for a row with a logit that is not finite.
    ///
    /// # Errors
    ///
    /// As [`Self::forward`].
    pub fn forward_greedy(
        &self,
        pool: &mut DevicePool,
        scratch: &mut DeviceScratch,
        steps: &[Step<'_>],
        before_layer: &mut dyn FnMut(BeforeDeviceLayer<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<Option<u32>>>, ForwardError> {
        let (rows, wanted) = self.run(pool, scratch, steps, before_layer)?;
        let mut best = vec![0u32; wanted];
        if wanted == 0 {
            self.settle()?;
        } else {
            let machine = &self.machine;
            let arguments = Argmax {
                logits: scratch.logits.address(),
                best: scratch.tokens.ensure(machine, 4 * wanted)?,
                vocab: narrow(self.config.vocab_size),
            };
            let warps = (ROW_THREADS / LANES) as usize;
            let launch = Launch::rows("argmax", wanted, arguments.to_bytes()).sharing(2 * warps);
            machine.launch(Stream::Compute, launch)?;
            let bytes = bytemuck::cast_slice_mut(&mut best);
            machine.download(scratch.tokens.memory(), 0, bytes)?;
        }
        let mut best = best.into_iter().map(|id| (id != NONE).then_some(id));
        let steps = rows.ranges.iter().enumerate().map(|(step, range)| {
            let wanted = range.end - rows.first_wanted(step);
            best.by_ref().take(wanted).collect()
        });
        Ok(steps.collect())
    }

    /// Waits for all that was asked.
    fn settle(&self) -> Result<(), DeviceError> {
        self.machine.finish(&self.machine.record(Stream::Compute)?)
    }

    /// All layers, and the logits of the rows that want them; their number.
    fn run<'a>(
        &self,
        pool: &mut DevicePool,
        scratch: &mut DeviceScratch,
        steps: &'a [Step<'a>],
        before_layer: &mut dyn FnMut(BeforeDeviceLayer<'_>) -> ControlFlow<()>,
    ) -> Result<(Rows<'a>, usize), ForwardError> {
        check(&self.config, pool.geometry(), steps)?;
        let rows = Rows::new(steps);
        scratch.reserve(self, rows.positions.len())?;
        let batch = Batch {
            model: self,
            machine: &self.machine,
            rows,
            scratch,
            tables: Vec::new(),
            placed: false,
            planned: None,
        };
        batch.run(pool, before_layer)
    }
}

/// Checked steps on their way.
struct Batch<'a, 'b> {
    model: &'b DeviceModel,
    machine: &'b Machine,
    rows: Rows<'a>,
    scratch: &'b mut DeviceScratch,
    /// Where each step's page table begins on the device.
    tables: Vec<usize>,
    /// Whether the device knows where all rows go.
    placed: bool,
    /// What the plan on the device is of, if others of the same kind may use it.
    planned: Option<(Option<usize>, Plan)>,
}

impl<'a> Batch<'a, '_> {
    fn run(
        mut self,
        pool: &mut DevicePool,
        before_layer: &mut dyn FnMut(BeforeDeviceLayer<'_>) -> ControlFlow<()>,
    ) -> Result<(Rows<'a>, usize), ForwardError> {
        let model = self.model;
        let config = &model.config;
        self.embed()?;
        let mut pages = vec![Pages::All; self.rows.steps.len()];
        let mut rows = self.rows.positions.len();
        for (index, layer) in model.weights.layers.iter().enumerate() {
            self.project_qkv(layer)?;
            let mut fates = vec![Fate::GoesOn; rows];
            pages.fill(Pages::All);
            let before = BeforeDeviceLayer {
                layer: index,
                rows: LayerRows {
                    machine: self.machine,
                    memory: self.scratch.qkv.memory(),
                    rows,
                    stride: config.qkv_width(),
                },
                pool,
                positions: &self.rows.positions,
                steps: &self.rows.ranges,
                fates: &mut fates,
                pages: &mut pages,
            };
            if before_layer(before).is_break() {
                self.model.settle()?;
                return Err(ForwardError::Stopped);
            }
            for (step, range) in self.rows.ranges.iter().enumerate() {
                fates[self.rows.first_wanted(step)..range.end].fill(Fate::GoesOn);
            }
            pool.before_computing(index)?;
            self.append(pool, index, &fates)?;
            self.drop_rows(&fates)?;
            rows = self.rows.positions.len();
            let last = index + 1 == config.layers;
            self.attend(pool, index, &pages, last)?;
            pool.after_computing(index)?;
            if last {
                // What follows is wanted only for rows with logits.
                rows = self.keep_wanted()?;
            }
            self.finish_layer(layer, rows)?;
        }
        self.logits(rows)?;
        Ok((self.rows, rows))
    }

    fn launch(&self, launch: Launch) -> Result<(), DeviceError> {
        self.machine.launch(Stream::Compute, launch)
    }

    /// Embeddings into the residual stream, and what the device is to know of the batch.
    fn embed(&mut self) -> Result<(), DeviceError> {
        let steps = self.rows.steps;
        let (model, scratch) = (self.model, &mut *self.scratch);
        let mut blocks = Vec::new();
        for step in steps {
            self.tables.push(blocks.len());
            blocks.extend(step.blocks.iter().map(|block| block.0));
        }
        scratch.blocks.send(self.machine, &blocks)?;
        let tokens: Vec<u32> = steps.iter().flat_map(|step| step.tokens).copied().collect();
        let weights = &model.weights;
        let table = weights.embedding.as_ref().unwrap_or(&weights.lm_head);
        let arguments = Embed {
            tokens: scratch.tokens.send(self.machine, &tokens)?,
            table: table.address,
            stream: scratch.stream.address(),
            hidden: narrow(model.config.hidden),
            dtype: type_number(model.dtype),
        };
        self.launch(Launch::rows("embed", tokens.len(), arguments.to_bytes()))?;
        self.turn()
    }

    /// Positions of the rows, and their angles.
    fn turn(&mut self) -> Result<(), DeviceError> {
        let positions: Vec<u32> = self.rows.positions.iter().map(|&at| narrow(at)).collect();
        let weights = &self.model.weights;
        let arguments = Angles {
            positions: self.scratch.positions.send(self.machine, &positions)?,
            radians: weights.radians.address,
            angles: self.scratch.angles.address(),
            pairs: narrow(self.model.config.head_dim / 2),
            factor: weights.attention_factor,
        };
        self.launch(Launch::rows(
            "angles",
            positions.len(),
            arguments.to_bytes(),
        ))
    }

    /// RMSNorm of the first rows of the stream.
    fn norm(&self, weight: &Memory, rows: usize) -> Result<(), DeviceError> {
        let config = &self.model.config;
        let arguments = Norm {
            stream: self.scratch.stream.address(),
            weight: weight.address,
            out: self.scratch.normed.address(),
            width: narrow(config.hidden),
            dtype: type_number(self.model.dtype),
            eps: config.rms_norm_eps,
        };
        let warps = (ROW_THREADS / LANES) as usize;
        self.launch(Launch::rows("rms_norm", rows, arguments.to_bytes()).sharing(warps))
    }

    fn multiply(
        &self,
        weight: &Memory,
        input: &Buffer,
        output: &Buffer,
        [rows, inputs, outputs]: [usize; 3],
        accumulate: bool,
    ) -> Result<(), DeviceError> {
        self.machine.multiply(Product {
            weight: weight.address,
            input: input.address(),
            output: output.address(),
            rows,
            inputs,
            outputs,
            dtype: self.model.dtype,
            accumulate,
        })
    }

    /// Normed stream to Q, K and V, with biases, norms and rotation applied.
    fn project_qkv(&self, layer: &DeviceLayer) -> Result<(), DeviceError> {
        let (config, scratch) = (&self.model.config, &*self.scratch);
        let rows = self.rows.positions.len();
        self.norm(&layer.attention_norm, rows)?;
        let sizes = [rows, config.hidden, config.qkv_width()];
        let matrix = &layer.qkv.matrix;
        self.multiply(matrix, &scratch.normed, &scratch.qkv, sizes, false)?;
        let norms = layer.head_norms.as_ref();
        let arguments = Heads {
            qkv: scratch.qkv.address(),
            bias: layer.qkv.bias_address(),
            q_norm: norms.map_or(0, |(q, _)| q.address),
            k_norm: norms.map_or(0, |(_, k)| k.address),
            angles: scratch.angles.address(),
            rows: narrow(rows),
            heads: narrow(config.heads),
            kv_heads: narrow(config.kv_heads),
            dim: narrow(config.head_dim),
            eps: config.rms_norm_eps,
        };
        let lanes = rows * (config.heads + 2 * config.kv_heads) * LANES as usize;
        self.launch(Launch::elements("heads", lanes, arguments.to_bytes()))
    }

    /// K and V of rows into the pages.
    fn append(
        &mut self,
        pool: &DevicePool,
        layer: usize,
        fates: &[Fate],
    ) -> Result<(), DeviceError> {
        let all = !fates.contains(&Fate::Dropped);
        if !(self.placed && all) {
            self.place(fates)?;
        }
        self.placed = all;
        let config = &self.model.config;
        let arguments = Append {
            qkv: self.scratch.qkv.address(),
            pool: pool.layer_address(layer),
            places: self.scratch.places.address(),
            heads: narrow(config.heads),
            kv_heads: narrow(config.kv_heads),
            dim: narrow(config.head_dim),
            dtype: type_number(pool.dtype()),
        };
        self.launch(Launch::rows("append", fates.len(), arguments.to_bytes()))
    }

    /// Where each row's K and V go.
    fn place(&mut self, fates: &[Fate]) -> Result<(), DeviceError> {
        let mut places = Vec::with_capacity(fates.len());
        for (step, range) in self.rows.steps.iter().zip(&self.rows.ranges) {
            for row in range.clone() {
                let position = self.rows.positions[row];
                let block = step.blocks[position / BLOCK_TOKENS].0 as usize;
                places.push(match fates[row] {
                    Fate::Dropped => NONE,
                    _ => narrow(block * BLOCK_TOKENS + position % BLOCK_TOKENS),
                });
            }
        }
        self.scratch.places.send(self.machine, &places)?;
        Ok(())
    }

    /// Takes rows that do not go on out of the buffers that are still to be read.
    fn drop_rows(&mut self, fates: &[Fate]) -> Result<(), DeviceError> {
        if fates.iter().all(|fate| *fate == Fate::GoesOn) {
            return Ok(());
        }
        let config = &self.model.config;
        let kept: Vec<u32> = Rows::going_on(fates).map(narrow).collect();
        let scratch = &mut *self.scratch;
        let rows = scratch.kept.send(self.machine, &kept)?;
        for (from, to, width) in [
            (&scratch.stream, &scratch.stream_kept, config.hidden),
            (&scratch.qkv, &scratch.qkv_kept, config.qkv_width()),
        ] {
            gather(self.machine, from, to, rows, kept.len(), 4 * width)?;
        }
        std::mem::swap(&mut scratch.stream, &mut scratch.stream_kept);
        std::mem::swap(&mut scratch.qkv, &mut scratch.qkv_kept);
        self.rows.drop(fates);
        self.placed = false;
        self.planned = None;
        self.turn()
    }

    fn attend(
        &mut self,
        pool: &DevicePool,
        layer: usize,
        pages: &[Pages],
        only_wanted: bool,
    ) -> Result<(), DeviceError> {
        let config = &self.model.config;
        let window = config.windows[layer];
        let all = !only_wanted && pages.iter().all(|pages| *pages == Pages::All);
        let plan = match self.planned.take() {
            Some((of, plan)) if all && of == window => plan,
            _ => self.send_plan(window, pages, only_wanted)?,
        };
        let scratch = &mut *self.scratch;
        let units = scratch.plan.address() + 4 * plan.lists.len() as u64;
        let merges = units + 4 * (plan.rows.len() * UNIT_WORDS) as u64;
        let tiles = merges + 8 * plan.merges.len() as u64;
        let dim = config.head_dim;
        #[expect(clippy::cast_precision_loss, reason = "head_dim is at most 512")]
        let scale = 1.0 / (dim as f32).sqrt();
        let partial_bytes = 4 * plan.rows.len() * partial_floats(dim);
        let partial = scratch.partial.ensure(self.machine, partial_bytes)?;
        let attend = Attend {
            queries: scratch.qkv.address(),
            pool: pool.layer_address(layer),
            positions: scratch.positions.address(),
            blocks: scratch.blocks.address(),
            lists: scratch.plan.address(),
            units,
            partial,
            out: scratch.attended.address(),
            stride: narrow(config.qkv_width()),
            heads: narrow(config.heads),
            kv_heads: narrow(config.kv_heads),
            dim: narrow(dim),
            window: window.map_or(NONE, narrow),
            out_type: type_number(self.model.dtype),
            scale,
            unused: 0,
        };
        let rows = Launch::rows(
            row_kernel(pool.dtype(), dim),
            plan.rows.len(),
            attend.to_bytes(),
        );
        self.launch(rows.sharing(row_shared(dim)))?;
        let merge = Merge {
            partial,
            units,
            merges,
            out: attend.out,
            heads: attend.heads,
            dim: attend.dim,
            out_type: attend.out_type,
            unused: 0,
        };
        self.launch(Launch::rows("merge", plan.merges.len(), merge.to_bytes()))?;
        let attend = Attend {
            units: tiles,
            ..attend
        };
        let tiles = Launch::rows(
            tile_kernel(pool.dtype()),
            plan.tiles.len(),
            attend.to_bytes(),
        );
        self.launch(tiles.sharing(tile_shared(dim)))?;
        self.planned = all.then_some((window, plan));
        Ok(())
    }

    /// Makes the plan of a layer, and sends it.
    fn send_plan(
        &mut self,
        window: Option<usize>,
        pages: &[Pages],
        only_wanted: bool,
    ) -> Result<Plan, DeviceError> {
        let config = &self.model.config;
        let rows = &self.rows;
        // From all rows of the steps, those included that attend no more.
        let listed: Vec<Option<Vec<Vec<u32>>>> = rows
            .ranges
            .iter()
            .zip(pages)
            .map(|(range, pages)| pages.listed(config.kv_heads, &rows.positions[range.clone()]))
            .collect();
        let queries: Vec<Queries<'_>> = rows
            .ranges
            .iter()
            .enumerate()
            .map(|(step, range)| {
                let first_row = if only_wanted {
                    rows.first_wanted(step)
                } else {
                    range.start
                };
                Queries {
                    first_row,
                    positions: &rows.positions[first_row..range.end],
                    table: self.tables[step],
                    pages: listed[step].as_deref(),
                }
            })
            .collect();
        let shape = Shape {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            window,
            processors: self.machine.processors(),
        };
        let plan = Plan::new(shape, &queries);
        let mut words = plan.lists.clone();
        words.extend(plan.rows.iter().flat_map(|unit| unit.words()));
        words.extend(plan.merges.iter().flatten());
        words.extend(plan.tiles.iter().flat_map(|unit| unit.words()));
        self.scratch.plan.send(self.machine, &words)?;
        Ok(plan)
    }

    /// Moves the rows that give logits to the front; returns their number.
    fn keep_wanted(&mut self) -> Result<usize, DeviceError> {
        let rows = &self.rows;
        let wanted = rows.ranges.iter().enumerate();
        let wanted = wanted.flat_map(|(step, range)| rows.first_wanted(step)..range.end);
        let kept: Vec<u32> = wanted.map(narrow).collect();
        if kept.len() == rows.positions.len() {
            return Ok(kept.len());
        }
        let (config, element) = (&self.model.config, self.model.dtype.bytes());
        let scratch = &mut *self.scratch;
        let rows = scratch.kept.send(self.machine, &kept)?;
        let heads = element * config.heads * config.head_dim;
        for (from, to, bytes) in [
            (&scratch.stream, &scratch.stream_kept, 4 * config.hidden),
            (&scratch.attended, &scratch.attended_kept, heads),
        ] {
            gather(self.machine, from, to, rows, kept.len(), bytes)?;
        }
        std::mem::swap(&mut scratch.stream, &mut scratch.stream_kept);
        std::mem::swap(&mut scratch.attended, &mut scratch.attended_kept);
        Ok(kept.len())
    }

    /// Attention's output projection and the MLP, each added to the stream.
    fn finish_layer(&self, layer: &DeviceLayer, rows: usize) -> Result<(), DeviceError> {
        let (config, scratch) = (&self.model.config, &*self.scratch);
        let (hidden, wide) = (config.hidden, config.intermediate);
        let heads = config.heads * config.head_dim;
        let matrix = &layer.output.matrix;
        let sizes = [rows, heads, hidden];
        self.multiply(matrix, &scratch.attended, &scratch.stream, sizes, true)?;
        self.add_bias(&layer.output, rows)?;

        self.norm(&layer.mlp_norm, rows)?;
        let matrix = &layer.gate_up.matrix;
        let sizes = [rows, hidden, 2 * wide];
        self.multiply(matrix, &scratch.normed, &scratch.gate_up, sizes, false)?;
        let arguments = Activate {
            gate_up: scratch.gate_up.address(),
            bias: layer.gate_up.bias_address(),
            out: scratch.activated.address(),
            rows: narrow(rows),
            width: narrow(wide),
            dtype: type_number(self.model.dtype),
        };
        let launch = Launch::elements("activate", rows * wide, arguments.to_bytes());
        self.launch(launch)?;
        let matrix = &layer.down.matrix;
        let sizes = [rows, wide, hidden];
        self.multiply(matrix, &scratch.activated, &scratch.stream, sizes, true)?;
        self.add_bias(&layer.down, rows)
    }

    /// A projection's bias to the stream, if there is one.
    fn add_bias(&self, linear: &DeviceLinear, rows: usize) -> Result<(), DeviceError> {
        let Some(bias) = &linear.bias else {
            return Ok(());
        };
        let hidden = self.model.config.hidden;
        let arguments = AddBias {
            values: self.scratch.stream.address(),
            bias: bias.address,
            rows: narrow(rows),
            width: narrow(hidden),
        };
        let launch = Launch::elements("add_bias", rows * hidden, arguments.to_bytes());
        self.launch(launch)
    }

    fn logits(&mut self, rows: usize) -> Result<(), DeviceError> {
        let config = &self.model.config;
        let weights = &self.model.weights;
        self.norm(&weights.final_norm, rows)?;
        let bytes = 4 * rows * config.vocab_size;
        self.scratch.logits.ensure(self.machine, bytes)?;
        let scratch = &*self.scratch;
        let sizes = [rows, config.hidden, config.vocab_size];
        self.multiply(
            &weights.lm_head,
            &scratch.normed,
            &scratch.logits,
            sizes,
            false,
        )
    }
}

impl DeviceLinear {
    /// 0 where there is none.
    fn bias_address(&self) -> u64 {
        self.bias.as_ref().map_or(0, |bias| bias.address)
    }
}

/// Some rows of so many bytes, into another buffer.
fn gather(
    machine: &Machine,
    from: &Buffer,
    to: &Buffer,
    rows: u64,
    count: usize,
    row_bytes: usize,
) -> Result<(), DeviceError> {
    let arguments = Gather {
        from: from.address(),
        to: to.address(),
        rows,
        // Widths of products are multiples of four elements.
        width: narrow(row_bytes / 4),
    };
    let launch = Launch::rows("gather", count, arguments.to_bytes());
    machine.launch(Stream::Compute, launch)
}

/// What kernels take for nothing.
const NONE: u32 = u32::MAX;
const UNIT_WORDS: usize = 9;
