//! Rotary position embedding with YaRN. Sources: Su et al., 2021; Peng et al., 2023 (YaRN), as transformers computes it
//! (`modeling_rope_utils.py`): inverse frequencies and angles in f32, a factor on cos and sin.

/// YaRN's parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// By how much the context grew.
    pub factor: f64,
    /// Rotations over the original context above which a frequency stays.
    pub beta_fast: f64,
    /// Rotations below which it is divided by `factor`.
    pub beta_slow: f64,
    /// original_max_position_embeddings.
    pub original_context: f64,
    /// Whether the bounds of the ramp are rounded to whole dimensions; gpt-oss says no.
    pub truncate: bool,
    /// Factor on cos and sin: 0.1 ln(factor) + 1.
    pub attention_factor: f64,
}

/// Frequencies of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Angle a position, one for each pair of dimensions (i, i + head_dim / 2).
    pub frequencies: Vec<f32>,
    /// Factor on cos and sin.
    pub factor: f64,
    /// rope_theta.
    pub theta: f64,
    /// What stretches the context, if anything.
    pub yarn: Option<Yarn>,
}

impl Rope {
    /// The frequencies for heads of `dim` dimensions.
    pub fn new(dim: usize, theta: f64, yarn: Option<&Yarn>) -> Self {
        let plain = |i: usize| 1.0 / libm::pow(theta, (2 * i) as f64 / dim as f64);
        let frequency = |i: usize| match yarn {
            None => plain(i),
            Some(y) => {
                let (low, high) = y.ramp(dim as f64, theta);
                let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain(i) / y.factor * interpolated + plain(i) * (1.0 - interpolated)
            }
        };
        let frequencies = (0..dim / 2).map(|i| frequency(i) as f32).collect();
        Self { frequencies, factor: yarn.map_or(1.0, |y| y.attention_factor), theta, yarn: yarn.cloned() }
    }

    /// cos and sin [positions, head_dim / 2].
    pub fn table(&self, positions: impl Iterator<Item = usize> + Clone) -> (Vec<f32>, Vec<f32>) {
        let angles = positions.flat_map(|p| self.frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let scaled = |f: fn(f64) -> f64| angles.clone().map(|a| (f(a) * self.factor) as f32).collect();
        (scaled(libm::cos), scaled(libm::sin))
    }
}

impl Yarn {
    /// The dimensions between which frequencies go over from kept to divided.
    fn ramp(&self, dim: f64, theta: f64) -> (f64, f64) {
        let dimension = |rotations: f64| {
            dim * libm::log(self.original_context / (rotations * 2.0 * std::f64::consts::PI)) / (2.0 * libm::log(theta))
        };
        let (mut low, mut high) = (dimension(self.beta_fast), dimension(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // Equal bounds would divide by zero.
        if low == high { (low, high + 0.001) } else { (low, high) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_settings_give_the_published_ramp() {
        let yarn = Yarn {
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 4096.0,
            truncate: false,
            attention_factor: 0.1 * 32f64.ln() + 1.0,
        };
        // 64 ln(4096 / (32 * 2 pi)) / (2 ln 150000) and the same for one rotation.
        let (low, high) = yarn.ramp(64.0, 150_000.0);
        assert!((low - 8.092_779).abs() < 1e-5 && (high - 17.398_025).abs() < 1e-5, "{low} {high}");
        let rope = Rope::new(64, 150_000.0, Some(&yarn));
        assert_eq!(rope.frequencies[0], 1.0);
        let plain = Rope::new(64, 150_000.0, None);
        assert_eq!(rope.frequencies[8], plain.frequencies[8]);
        assert_eq!(rope.frequencies[31], plain.frequencies[31] / 32.0);
        let (cos, sin) = rope.table(0..2);
        assert!((cos[0] - 1.346_573_6).abs() < 1e-6 && sin[0] == 0.0);
        assert!((sin[32] - 1.346_573_6 * 1f32.sin()).abs() < 1e-6);
    }
}
