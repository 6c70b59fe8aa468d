use proptest::prelude::*;

use super::*;
use crate::channels::moments;

/// Rows of normal values: the width, and the standard deviation of each channel.
pub(crate) fn gaussian(width: usize, tokens: usize, seed: u64) -> Vec<f32> {
    let mut state = seed | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        #[expect(clippy::cast_precision_loss, reason = "a random number")]
        let value = (state >> 40) as f32 / (1u32 << 24) as f32;
        value
    };
    (0..width * tokens)
        .map(|at| {
            #[expect(clippy::cast_precision_loss, reason = "small")]
            let scale = 0.2 + (at % width) as f32 / width as f32 * 3.0;
            let sum: f32 = (0..12).map(|_| uniform()).sum();
            (sum - 6.0) * scale + 5.0 * scale
        })
        .collect()
}

impl CellSink for Vec<Vec<u8>> {
    fn add(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let mut cell = Vec::new();
        write(&mut cell);
        self.push(cell);
    }
}

pub(crate) fn quantiser(rows: &[f32], width: usize, step: f32) -> Quantiser {
    let moments = moments(&Input::Rows(rows.into()), 0..rows.len() / width, width);
    Quantiser::of(&moments, step)
}

/// The parts of one cell.
fn encoded(quantiser: &Quantiser, rows: &[f32]) -> [Vec<u8>; LADDER] {
    let mut parts = [(); LADDER].map(|()| Vec::new());
    let tokens = rows.len() / quantiser.width();
    let input = Input::Rows(rows.into());
    Encoder::new().encode(quantiser, &input, (0, 1, tokens), 0, &mut parts);
    parts.map(|cells: Vec<Vec<u8>>| cells.concat())
}

fn decoded(quantiser: &Quantiser, parts: &[Vec<u8>], len: usize) -> Result<Vec<f32>, CellError> {
    let width = quantiser.width();
    let levels: Vec<[&[u8]; AT_ONCE]> = parts
        .iter()
        .map(|part| [part.as_slice(); AT_ONCE])
        .collect();
    let tokens = len / width;
    let step = quantiser.step_at(parts.len() - 1);
    let mut values = vec![0.0; len];
    Decoder::new().decode(quantiser, &levels, 1, tokens, 1, |numbers| {
        for (token, row) in numbers.rows(0, 0).iter().enumerate() {
            for (lane, &number) in row.iter().enumerate() {
                let channel = numbers.first * LANES + lane;
                values[token * width + channel] =
                    f32::from(number) * step + quantiser.offsets[channel];
            }
        }
        for &(position, value) in numbers.outliers(0) {
            if usize::from(position) % width / LANES == numbers.first {
                values[usize::from(position)] = value;
            }
        }
    })?;
    Ok(values)
}

#[test]
fn a_level_is_as_exact_as_its_step() {
    let rows = gaussian(64, 50, 3);
    for step in [0.05, 0.5, 3.0, 40.0] {
        let quantiser = quantiser(&rows, 64, step);
        let parts = encoded(&quantiser, &rows);
        let mut level_step = step;
        for level in 0..LADDER {
            let got = decoded(&quantiser, &parts[..=level], rows.len()).unwrap();
            let errors = rows.iter().zip(&got).map(|(a, b)| (a - b).abs());
            let worst = errors.fold(0.0, f32::max);
            assert!(worst <= level_step * 0.5001, "{step} {level}: {worst}");
            level_step /= 3.0;
        }
    }
}

#[test]
fn what_is_no_number_stays_what_it_is() {
    let mut rows = gaussian(32, 64, 3);
    let strange = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e30,
        -1e-40,
        3e8,
    ];
    for (at, value) in strange.into_iter().enumerate() {
        rows[at * 37] = value;
    }
    let quantiser = quantiser(&gaussian(32, 64, 3), 32, 0.3);
    let parts = encoded(&quantiser, &rows);
    let got = decoded(&quantiser, &parts[..1], rows.len()).unwrap();
    assert!(got[0].is_nan());
    assert_eq!(got[37..=37], [f32::INFINITY]);
    assert_eq!(got[2 * 37], f32::NEG_INFINITY);
    assert_eq!(got[3 * 37], 1e30);
    assert!((got[4 * 37]).abs() < 0.16);
    assert_eq!(got[5 * 37], 3e8);
}

#[test]
fn nothing_costs_nothing() {
    let rows = vec![0.0; 64 * 64];
    let quantiser = quantiser(&rows, 64, 0.1);
    let parts = encoded(&quantiser, &rows);
    let lengths = parts.each_ref().map(Vec::len);
    assert_eq!(lengths, [2 + 128, 0, 0]);
    assert_eq!(decoded(&quantiser, &parts, rows.len()).unwrap(), rows);
}

/// Close to what a coder that knows every distribution needs, however many levels it
/// takes.
#[test]
fn a_value_takes_what_its_distribution_needs() {
    let (width, tokens) = (256, 64);
    let rows = gaussian(width, tokens, 9);
    let ideal = (0u8..=255).map(|channel| {
        let scale = 0.2 + f64::from(channel) / 256.0 * 3.0;
        // High-rate entropy of a normal variable, and no less than nothing.
        (scale.log2() + 2.047).max(0.3) / 256.0
    });
    let ideal: f64 = ideal.sum();
    let mut at_once = None;
    for (step, level) in [(1.0f32, 0), (3.0, 1), (9.0, 2)] {
        let quantiser = quantiser(&rows, width, step);
        let parts = encoded(&quantiser, &rows);
        let bytes: usize = parts[..=level].iter().map(Vec::len).sum();
        // Half of what is in the states of a stream is symbols.
        let states = 64 + 2;
        #[expect(clippy::cast_precision_loss, reason = "small")]
        let bits = 8.0 * (bytes - states) as f64 / rows.len() as f64;
        assert!((bits - ideal).abs() < 0.1, "{step}: {bits} {ideal}");
        let at_once = *at_once.get_or_insert(bits);
        assert!((bits - at_once).abs() < 0.05, "{step}: {bits} {at_once}");
    }
}

#[test]
fn streams_are_as_long_as_they_may_be() {
    let values = 32;
    let base = |outliers: u8, words: usize| {
        let stream = vec![7; rans::STATE_BYTES + words];
        [vec![outliers, 0], stream].concat()
    };
    let split = |base: &[u8], words: &[u8]| {
        let streams = Streams::of(&[base, words], values);
        streams.map(|streams| (streams.states, streams.words.map(<[u8]>::len)))
    };
    let states = [0x0707_0707; LANES];
    assert_eq!(split(&base(0, 64), &[9; 6]), Ok((states, [64, 6, 0])));
    let length = |bytes| Err(CellError::Stream(StreamError::Length(bytes)));
    for bytes in [63, 66] {
        assert_eq!(split(&base(0, bytes), &[]), length(bytes));
        assert_eq!(split(&base(0, 0), &vec![9; bytes]), length(bytes));
    }
    let short = &base(0, 0)[..2 + 127];
    assert_eq!(split(short, &[]), length(127));
    assert_eq!(split(&base(200, 0), &[]), Err(CellError::Outliers));
}

#[test]
fn outliers_ascend_and_stay_inside() {
    let read = |positions: &[u16]| {
        let outliers: Outliers = positions.iter().map(|&at| (at, 1.0)).collect();
        let mut part = Vec::new();
        write_outliers(&outliers, &mut part);
        let mut read = Vec::new();
        read_outliers(&part, 9, &mut read).map(|_| read.len())
    };
    assert_eq!(read(&[0, 3, 8]), Ok(3));
    for wrong in [&[3, 2][..], &[3, 3], &[9]] {
        assert_eq!(read(wrong), Err(CellError::Outliers));
    }
}

proptest! {
    #[test]
    fn damage_is_an_error_or_other_numbers_and_no_panic(
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
        part in 0..LADDER,
    ) {
        let rows = gaussian(32, 40, 5);
        let quantiser = quantiser(&rows, 32, 1.0);
        let mut parts = encoded(&quantiser, &rows);
        let at = at.index(parts[part].len());
        parts[part][at] = byte;
        let _ = decoded(&quantiser, &parts, rows.len());
        let cut = cut.index(parts[part].len());
        parts[part].truncate(cut);
        prop_assert!(decoded(&quantiser, &parts, rows.len()).is_err());
    }
}
