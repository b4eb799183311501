//! Transforms that leave the model what it is: scales go from a norm into every layer that reads it. For gpt-oss the two
//! norms of a layer are the only such places: up -> down is cut by (u + 1) and the clamp, v -> o by the shared key heads.

use crate::algorithms::awq::{self, Reader};
use crate::algorithms::{Algorithm, smoothquant};
use crate::containers;
use crate::device::Moments;
use crate::error::Result;
use crate::formats::float::Float;
use crate::model::Linear;

use super::{Calibrator, Inputs, LayerReport, Output};

/// Rows of weights that AWQ weighs its scales on, over all that read a norm; evenly drawn from each.
const SAMPLE: usize = 4096;
/// But no fewer of each than this.
const LEAST: usize = 16;

/// The outcome for one norm.
pub(super) struct Smoothing {
    /// Weights are multiplied by these, inputs divided [H].
    pub(super) scales: Vec<f32>,
    /// The norm's new weight, as it is on disk [H].
    pub(super) norm: Vec<f32>,
}

impl Smoothing {
    /// Sums over the inputs, as the new norm makes them.
    pub(super) fn of_inputs(&self, inputs: Inputs) -> Inputs {
        let mut m: Moments = inputs.moments;
        let n = self.scales.len();
        for (i, row) in m.gram.chunks_exact_mut(n).enumerate() {
            row.iter_mut().zip(&self.scales).for_each(|(g, s)| *g = *g / s / self.scales[i]);
        }
        m.abs.iter_mut().zip(&self.scales).for_each(|(v, s)| *v /= s);
        m.max.iter_mut().zip(&self.scales).for_each(|(v, s)| *v /= s);
        Inputs::new(m)
    }
}

impl Calibrator<'_> {
    /// Finds the scales for the layers that read the norm `name`, and writes its new weight.
    pub(super) fn smooth(
        &self,
        name: &str,
        readers: &[Linear],
        inputs: &Inputs,
        output: &dyn Output,
        report: &mut LayerReport,
    ) -> Result<Smoothing> {
        let (mut norm, float) = containers::vector(&self.model.checkpoint, name, &[self.model.config.hidden])?;
        let exact = |scales: &mut [f32]| {
            norm.iter().zip(scales).for_each(|(n, s)| *s = power_of_two(*n, *s, float));
        };
        let m = &inputs.moments;
        let algorithm = |l: &Linear| output.treatment(l).map(|t| t.layer.algorithm);
        let scales = if readers.iter().all(|l| algorithm(l) == Some(Algorithm::Awq)) {
            let mean: Vec<f32> = m.abs.iter().map(|a| a / m.count.max(1) as f32).collect();
            let (sample, settings) = (self.sample(readers, output)?, &self.recipe.awq);
            let (scales, gain) = self.device.enter(|| awq::search(&sample, &mean, &m.gram, settings, exact));
            // Less would be written as nothing.
            let percent = 100.0 * gain;
            if percent >= 0.05 {
                report.notes.push(format!("{name}: AWQ's scales take {percent:.1}% off the error of what reads it"));
            }
            scales
        } else {
            let strength = self.recipe.smoothquant.as_ref().map_or(0.0, |s| s.strength);
            let mut scales = smoothquant::scales(&m.max, &self.greatest(readers)?, strength);
            exact(&mut scales);
            scales
        };
        norm.iter_mut().zip(&scales).for_each(|(n, s)| *n = float.round(*n / s));
        output.put_plain(name, &norm)?;
        Ok(Smoothing { scales, norm })
    }

    /// A sample of the rows of `readers`.
    fn sample(&self, readers: &[Linear], output: &dyn Output) -> Result<Vec<Reader>> {
        let each = (SAMPLE / readers.len().max(1)).max(LEAST);
        let mut sample: Vec<Reader> = Vec::new();
        for linear in readers {
            let weight = containers::open(&self.model.checkpoint, &self.model.config, linear)?;
            let (rows, columns) = weight.shape();
            let scheme = output.treatment(linear).and_then(|t| t.scheme).expect("AWQ rounds to codes");
            let target = scheme.target(columns, weight.float(), (0.0, 0.0));
            let alike = sample.iter().position(|r| r.target == target).unwrap_or_else(|| {
                sample.push(Reader { w: Vec::new(), target });
                sample.len() - 1
            });
            for row in (0..rows).step_by(rows.div_ceil(each)) {
                sample[alike].w.extend(self.source_rows(&weight, &linear.module(), row..row + 1, None)?);
            }
        }
        Ok(sample)
    }

    /// Greatest |w| of each input channel over all of `readers`.
    fn greatest(&self, readers: &[Linear]) -> Result<Vec<f32>> {
        let mut greatest = vec![0f32; self.model.config.hidden];
        for linear in readers {
            let weight = containers::open(&self.model.checkpoint, &self.model.config, linear)?;
            let (rows, columns) = weight.shape();
            for first in (0..rows).step_by(1024) {
                let w = self.source_rows(&weight, &linear.module(), first..rows.min(first + 1024), None)?;
                for row in w.chunks_exact(columns) {
                    greatest.iter_mut().zip(row).for_each(|(g, w)| *g = g.max(w.abs()));
                }
            }
        }
        Ok(greatest)
    }
}

/// The power of two nearest to `s`: with it every tensor that a transform changes, the norm's weight `n` of type `float`
/// among them, stays exact, and so do all products of the forward. 1 where the norm's weight would leave its type's range.
fn power_of_two(n: f32, s: f32, float: Float) -> f32 {
    // The middle, by ratio, between 1 and 2.
    let bits = (s / std::f32::consts::SQRT_2).to_bits();
    let power = f32::from_bits(((bits >> 23) + 1) << 23);
    let divided = float.round(n / power);
    if divided.is_finite() && divided * power == n { power } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_become_the_nearest_power_of_two() {
        for (s, want) in [
            (1.0, 1.0),
            (1.41, 1.0),
            (1.42, 2.0),
            (0.7, 0.5),
            (0.71, 1.0),
            (3.0, 4.0),
            (2.8, 2.0),
            (1e-3, 1.0 / 1024.0),
        ] {
            assert_eq!(power_of_two(0.75, s, Float::Bf16), want, "{s}");
        }
        // A norm's weight of 0 takes up any scale; one that would vanish in its type takes none.
        assert_eq!(power_of_two(0.0, 5.0, Float::Bf16), 4.0);
        assert_eq!(power_of_two(1e-7, 4.0, Float::F16), 1.0);
    }
}
