//! A size as the target: the recipe is the least that every layer gets, and what is left of the bytes goes where it saves
//! most. Schemes are tried on a part of the text, expert by expert ([`crate::calibrate::sensitivity`]); then steps to larger
//! schemes are taken, the one that saves the most error a byte first, while they fit. What comes out is a recipe with
//! overrides, so that nothing is left to measure where it is run again.

mod figures;
mod ladder;

use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Plan, calibrated, task};
use crate::algorithms::Algorithm;
use crate::calibrate::{Calibrator, Room, check_memory};
use crate::checkpoint::map;
use crate::checkpoint::source::Checkpoint;
use crate::device::cpu::Cpu;
use crate::error::{Error, Result};
use crate::evaluate;
use crate::formats::ggml::Ggml;
use crate::formats::ternary::Trits;
use crate::manifest::Job;
use crate::model::padding::Padding;
use crate::model::{self, Class, Linear, Model, ModelConfig, Proj};
use crate::pipeline::Resources;
use crate::pipeline::progress::Unit;
use crate::recipe::{Container, GroupSize, LayerRecipe, Override, Recipe, Rules, SHARD_SIZE, SchemeName};
use crate::runtimes::{self, Runtime};
use crate::text::Text;

pub use figures::Sensitivity;
use figures::folder_of;
use ladder::{Ladder, Rung, with};

/// Most sequences of the text that schemes are tried on: their order is known long before their figures are.
const SEQUENCES: usize = 64;

/// The version of the file of measured errors.
const SCHEMA: &str = "gptoss.sensitivity/1";

/// A flag that makes an output smaller, and what it does with the scheme for head and embedding.
type Saving = (String, fn(&mut Recipe, SchemeName));

/// Modules that no scheme is chosen for.
const APART: [&str; 2] = ["lm_head", "embed_tokens"];

/// A recipe, what it may grow to, and the size that it may have.
pub struct Budget<'a> {
    dir: &'a Path,
    raw_config: &'a Map<String, Value>,
    source: Option<&'a Checkpoint>,
    config: ModelConfig,
    recipe: Recipe,
    target: u64,
    /// Experts, then the other weights.
    ladders: [Ladder; 2],
    /// Bytes of the smallest and of the largest output.
    reach: (u64, u64),
}

/// What is raised as one: an expert, an attention, or what a container stores in one tensor.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    ladder: usize,
    layer: usize,
    expert: Option<usize>,
}

/// A place one or more rungs up.
#[derive(Debug, Clone, Copy)]
struct Step {
    place: usize,
    from: usize,
    to: usize,
    bytes: u64,
    /// Error that a byte saves.
    worth: f64,
}

impl<'a> Budget<'a> {
    /// Plans every rung of `recipe` for an output of at most `target` bytes.
    ///
    /// # Errors
    /// [`Error::Refused`] where the recipe is larger than that, with its size and what would make it smaller; where nothing
    /// can be raised; and for what cannot be measured a place at a time.
    pub fn new(
        dir: &'a Path,
        raw_config: &'a Map<String, Value>,
        recipe: &Recipe,
        target: u64,
        source: Option<&'a Checkpoint>,
        runtime: Option<Runtime>,
    ) -> Result<Self> {
        let alone = |what: &str| {
            Err(Error::Refused(format!(
                "--target-size goes with gptq, pt-bitnet and rtn: {what} is a matter of whole layers, and is not measured place by place"
            )))
        };
        if recipe.layers().any(|(_, l)| l.algorithm == Algorithm::Awq && l.is_rounded()) {
            return alone("AWQ");
        }
        if recipe.smoothquant.is_some() {
            return alone("SmoothQuant");
        }
        if recipe.sparsity.is_some() {
            return alone("sparsity");
        }
        let recipe = Recipe { target_size: Some(target), ..recipe.clone() };
        one_scheme_a_class(&recipe, &ModelConfig::parse(dir, raw_config)?)?;
        let own = Plan::new(dir, raw_config, recipe.clone(), source)?;
        let smallest = own.layout().total_bytes();
        let ladder = |class| Ladder::new(class, &own, |r| Plan::new(dir, raw_config, r, source));
        let ladders = [ladder(Class::Experts)?, ladder(Class::Main)?];
        let greatest = Plan::new(dir, raw_config, raised_to_top(&recipe, &ladders), source)?.layout().total_bytes();
        let (config, reach) = (own.config, (smallest, greatest));
        let budget = Self { dir, raw_config, source, config, recipe, target, ladders, reach };
        if smallest > target {
            return Err(Error::Refused(budget.too_small(runtime)));
        }
        if greatest == smallest {
            return Err(Error::Refused(format!(
                "--target-size: {} as experts and {} as the other weights have no larger scheme to grow to; the output is {} \
                 whatever the target",
                budget.recipe.experts.scheme,
                budget.recipe.mw.scheme,
                gigabytes(smallest)
            )));
        }
        Ok(budget)
    }

    /// Whether there is anything to choose: not where everything can be as large as can be.
    pub fn is_open(&self) -> bool {
        self.reach.1 > self.target
    }

    /// The least recipe, to be planned while nothing is measured, and what is known of the sizes.
    pub fn least(&self) -> (Recipe, String) {
        let [smallest, greatest, target] = [self.reach.0, self.reach.1, self.target].map(gigabytes);
        let note = match self.is_open() {
            true => format!(
                "this plan is the smallest, {smallest}; for {target} the run measures which experts and attentions lose most, and \
                 raises them (all raised: {greatest})"
            ),
            false => {
                format!("this plan is the smallest, {smallest}; {target} is room for all to be raised ({greatest})")
            }
        };
        (self.recipe.clone(), note)
    }

    /// Says what is too large, and what would help.
    fn too_small(&self, runtime: Option<Runtime>) -> String {
        let mut text = format!(
            "--target-size {} is less than this recipe can reach: {} with experts {} and other weights {}",
            gigabytes(self.target),
            gigabytes(self.reach.0),
            self.recipe.experts.scheme,
            self.recipe.mw.scheme
        );
        let mut recipe = self.recipe.clone();
        let (mut bytes, mut word) = (self.reach.0, "add");
        let gguf = recipe.container == Container::Gguf;
        let eight = if gguf { SchemeName::Ggml(Ggml::Q8_0) } else { SchemeName::weight_only(8) };
        for (flags, change) in self.savings() {
            let mut next = recipe.clone();
            change(&mut next, eight);
            let Ok(plan) = Plan::new(self.dir, self.raw_config, next.clone(), self.source) else { continue };
            let now = plan.layout().total_bytes();
            if now >= bytes || runtime.is_some_and(|r| runtimes::refusal(r, &plan.facts()).is_some()) {
                continue;
            }
            (recipe, bytes) = (next, now);
            let _ = write!(text, "; {word} {flags}: {}", gigabytes(bytes));
            word = "and";
            if bytes <= self.target {
                return text;
            }
        }
        text + "; no other flag was tried"
    }

    /// Flags that make an output smaller, gentlest first, and what they do.
    fn savings(&self) -> Vec<Saving> {
        let gguf = self.recipe.container == Container::Gguf;
        let eight = if gguf { "q8_0" } else { "w8a16" };
        let mut savings: Vec<Saving> = Vec::new();
        let ignored = |module: &str| self.recipe.ignore.iter().any(|p| p == module);
        if ignored(APART[0]) {
            savings.push((format!("--lm-head {eight}"), |r, eight| r.also(APART[0], LayerRecipe::new(eight))));
        }
        if ignored(APART[1]) {
            savings.push((format!("--embed-tokens {eight}"), |r, eight| r.also(APART[1], LayerRecipe::new(eight))));
        }
        // Not for weights that are to meet rounded inputs: these would not.
        if !gguf && !self.recipe.mw.scheme.rounds_inputs() {
            savings.push(("--mw w4a16".into(), |r, _| r.mw = LayerRecipe::new(SchemeName::weight_only(4))));
        }
        if !gguf && !self.recipe.experts.scheme.rounds_inputs() {
            savings.push(("--experts ternary_b3 --experts-group-size channel".into(), |r, _| {
                let layer = LayerRecipe::new(SchemeName::Ternary(Trits::Fifths));
                r.experts = LayerRecipe { group_size: GroupSize::Channel, ..layer };
            }));
        }
        savings
    }

    /// Measures what every rung costs in every place, or reads it from `file`, which is kept up to date layer by layer.
    ///
    /// # Errors
    /// [`Error::Refused`] where `file` holds the figures of something else.
    pub fn measure(
        &self,
        padding: Option<Padding>,
        text: &Text,
        resources: &Resources,
        file: &Path,
    ) -> Result<Sensitivity> {
        let Some(source) = self.source else {
            return Err(Error::Refused("--target-size measures weights, and there are none beside this config".into()));
        };
        // Each trial goes on through what it rounded, however the run does.
        let mut recipe = self.recipe.clone();
        recipe.calibration.sequential_update = true;
        let sequences = &text.sequences[..text.sequences.len().min(SEQUENCES)];
        let names = |l: &Ladder| -> Vec<SchemeName> { l.rungs.iter().map(|r| r.layer.scheme).collect() };
        let layers: Vec<&LayerRecipe> = self.ladders.iter().flat_map(|l| l.rungs.iter().map(|r| &r.layer)).collect();
        let rungs = serde_json::to_string(&layers).expect("they are in manifests");
        // What says nothing of experts and attentions may change between two runs.
        let mut asked = Recipe {
            target_size: None,
            shard_size: SHARD_SIZE,
            overrides: Vec::new(),
            notes: Vec::new(),
            ..recipe.clone()
        };
        asked.ignore.retain(|p| !APART.contains(&&p[..]));
        let job = task::fingerprint(&Job::Quantize { recipe: asked }, &calibrated::hash_of(sequences), &rungs, source);
        let mut found = Sensitivity {
            schema: SCHEMA.into(),
            job,
            experts: names(&self.ladders[0]),
            attention: names(&self.ladders[1]),
            tokens: sequences.iter().map(|s| s.real as u64).sum(),
            layers: Vec::new(),
        };
        if let Some(known) = Sensitivity::read(file)? {
            if (Sensitivity { layers: Vec::new(), ..known.clone() }) != found {
                return Err(Error::file(
                    file,
                    "holds what was measured of another checkpoint, text or recipe; remove it, or name another file \
                     (--sensitivity)",
                ));
            }
            found = known;
        }
        let model = Model::open_padded(&source.dir, padding)?;
        let layers = model.config.layers;
        let [experts, attention] = &self.ladders;
        let trials = (experts.trials().len(), attention.trials().len());
        found.check(trials, &model.config).map_err(|reason| Error::file(file, reason))?;
        if found.layers.len() >= layers {
            resources.progress.note(&format!("errors as measured before, from {}", file.display()));
            return Ok(found);
        }
        evaluate::fits(&model, &model, sequences)?;
        check_memory(resources.max_memory, &model.config)?;
        let device = Cpu::new(resources.threads)?;
        let folder = resources.offload.clone().unwrap_or_else(|| folder_of(file));
        let room = Room {
            memory: resources.max_memory,
            offload: &folder,
            offload_hessians: resources.offload_hessians,
            progress: &resources.progress,
        };
        // Whether it can be written shows now, and not after hours.
        found.write(file)?;
        let mut calibrator = Calibrator::new(&device, &model, &recipe, sequences, room)?;
        let (done, one) = (found.layers.len() as u64, 1 + (trials.0 + trials.1) as u64);
        let work = calibrator.work_a_layer() / 4 * (4 * done + one * (layers as u64 - done));
        resources.progress.start_counting("measure", work, Unit::Work);
        calibrator.embed()?;
        for l in 0..layers {
            if l < found.layers.len() {
                calibrator.pass(l)?;
                continue;
            }
            let errors = calibrator.measure(l, &attention.trials(), &experts.trials());
            // What was measured of a source that changed meanwhile is not noted.
            model.checkpoint.unchanged()?;
            map::intact()?;
            let errors = errors?;
            found.layers.push(errors);
            found.check(trials, &model.config).map_err(Error::Refused)?;
            found.write(file)?;
        }
        resources.progress.finish();
        Ok(found)
    }

    /// The recipe whose output is at most as large as the target, and loses least by these figures.
    pub fn pick(&self, sensitivity: Option<&Sensitivity>) -> Result<Recipe> {
        let Some(sensitivity) = sensitivity else {
            let mut recipe = raised_to_top(&self.recipe, &self.ladders);
            recipe.notes.push(format!("{} is room for the largest scheme everywhere", gigabytes(self.target)));
            return Ok(recipe);
        };
        let places = self.places();
        let mut steps = Vec::new();
        for (i, place) in places.iter().enumerate() {
            steps.extend(self.steps(i, place, sensitivity));
        }
        steps.sort_by(|a, b| b.worth.total_cmp(&a.worth).then(a.place.cmp(&b.place)).then(a.from.cmp(&b.from)));
        let mut at = vec![0; places.len()];
        let (mut left, mut taken) = (self.target - self.reach.0, Vec::new());
        for step in steps {
            if step.bytes <= left && at[step.place] == step.from {
                (left, at[step.place]) = (left - step.bytes, step.to);
                taken.push(step);
            }
        }
        loop {
            let mut recipe = self.raised(&places, &at);
            recipe.notes.push(format!("measured on {} tokens", sensitivity.tokens));
            let bytes = Plan::new(self.dir, self.raw_config, recipe.clone(), self.source)?.layout().total_bytes();
            if bytes <= self.target {
                return Ok(recipe);
            }
            // Headers grow with the tensors' names: the least of what was taken goes again.
            let step: Step = taken.pop().expect("with nothing taken it is the smallest, which fits");
            at[step.place] = step.from;
        }
    }

    /// Everything that can be raised by itself.
    fn places(&self) -> Vec<Place> {
        let config = &self.config;
        let whole = self.recipe.container != Container::CompressedTensors;
        let mut places = Vec::new();
        for layer in 0..config.layers {
            match whole {
                true => places.push(Place { ladder: 0, layer, expert: None }),
                false => places.extend((0..config.experts).map(|e| Place { ladder: 0, layer, expert: Some(e) })),
            }
            places.push(Place { ladder: 1, layer, expert: None });
        }
        // What the recipe leaves alone stays as it is.
        let treated = |p: &Place| {
            let own = &self.ladders[p.ladder].rungs[0];
            p.linears(config.experts).iter().any(|l| own.treated.contains_key(l))
        };
        places.retain(treated);
        places
    }

    /// The way up from a place's own scheme, as far as each step saves less a byte than the one before.
    fn steps(&self, number: usize, place: &Place, sensitivity: &Sensitivity) -> Vec<Step> {
        let ladder = &self.ladders[place.ladder];
        let linears = place.linears(self.config.experts);
        let errors = sensitivity.errors(place, ladder.rungs.len());
        let bytes = |rung: &Rung| -> u64 { linears.iter().map(|l| rung.sizes[l]).sum() };
        let bytes: Vec<u64> = ladder.rungs.iter().map(bytes).collect();
        let (mut steps, mut from) = (Vec::new(), 0);
        loop {
            let worth = |to: usize| (errors[from] - errors[to]) / (bytes[to] - bytes[from]) as f64;
            let up = (from + 1..bytes.len()).filter(|&to| bytes[to] > bytes[from] && errors[to] < errors[from]);
            // Of equal ones the nearest.
            let Some(to) = up.rev().max_by(|&a, &b| worth(a).total_cmp(&worth(b))) else { return steps };
            steps.push(Step { place: number, from, to, bytes: bytes[to] - bytes[from], worth: worth(to) });
            from = to;
        }
    }

    /// The recipe with every place on its rung.
    fn raised(&self, places: &[Place], at: &[usize]) -> Recipe {
        let mut recipe = self.recipe.clone();
        let mut overrides = Vec::new();
        for (ladder, of) in self.ladders.iter().enumerate() {
            let mut counts = Vec::new();
            for (rung, r) in of.rungs.iter().enumerate() {
                let here: Vec<&Place> =
                    places.iter().zip(at).filter(|(p, a)| p.ladder == ladder && **a == rung).map(|(p, _)| p).collect();
                if here.is_empty() {
                    continue;
                }
                counts.push(format!("{} {}", here.len(), r.layer.scheme));
                if rung > 0 {
                    let targets = patterns(&here, self.config.experts);
                    overrides.push(Override { targets, ignore: Vec::new(), layer: r.layer.clone() });
                }
            }
            if counts.is_empty() {
                continue;
            }
            let what = match (of.class, self.recipe.container) {
                (Class::Main, _) => "attentions",
                (Class::Experts, Container::CompressedTensors) => "experts",
                (Class::Experts, _) => "layers of experts",
            };
            recipe.notes.push(format!("for at most {}, {what}: {}", gigabytes(self.target), counts.join(", ")));
        }
        // What the user says of single modules comes later, and counts.
        recipe.overrides.splice(0..0, overrides);
        recipe
    }
}

/// `recipe` with the largest scheme everywhere.
fn raised_to_top(recipe: &Recipe, ladders: &[Ladder; 2]) -> Recipe {
    ladders.iter().fold(recipe.clone(), |r, l| with(&r, l.class, l.top().clone()))
}

/// Refuses a recipe in which experts or attentions have schemes of their own: they would be none of the ladders'.
fn one_scheme_a_class(recipe: &Recipe, config: &ModelConfig) -> Result<()> {
    let rules = Rules::new(recipe)?;
    let of_places = |l: &Linear| !matches!(l.proj, Proj::Embed | Proj::LmHead | Proj::Router);
    for linear in model::linears(config).filter(of_places) {
        if rules.layer(&linear).is_some_and(|layer| layer != recipe.class(linear.proj.class())) {
            return Err(Error::Refused(format!(
                "--target-size chooses schemes itself, above one least scheme for the experts and one for the other weights, and \
                 {} has another; give --experts and --mw",
                linear.module()
            )));
        }
    }
    Ok(())
}

impl Place {
    fn linears(&self, experts: usize) -> Vec<Linear> {
        let layer = self.layer;
        if self.ladder == 1 {
            return [Proj::Q, Proj::K, Proj::V, Proj::O].map(|proj| Linear { proj, layer, expert: 0 }).to_vec();
        }
        let of = |expert| [Proj::Gate, Proj::Up, Proj::Down].map(|proj| Linear { proj, layer, expert });
        self.expert.map_or(0..experts, |e| e..e + 1).flat_map(of).collect()
    }
}

/// Expressions for exactly these places, all of one ladder.
fn patterns(places: &[&Place], experts: usize) -> Vec<String> {
    let join = |numbers: &[usize]| numbers.iter().map(usize::to_string).collect::<Vec<_>>().join("|");
    let whole = |n: usize, p: &Place| p.expert.is_none() || n == experts;
    let (mut full, mut list) = (Vec::new(), Vec::new());
    for group in places.chunk_by(|a, b| a.layer == b.layer) {
        if whole(group.len(), group[0]) {
            full.push(group[0].layer);
        } else {
            let each: Vec<usize> = group.iter().filter_map(|p| p.expert).collect();
            list.push(format!(r"re:model\.layers\.{}\.mlp\.experts\.({})\.", group[0].layer, join(&each)));
        }
    }
    if !full.is_empty() {
        let part = if places[0].ladder == 0 { r"mlp\.experts" } else { "self_attn" };
        list.insert(0, format!(r"re:model\.layers\.({})\.{part}\.", join(&full)));
    }
    list
}

fn gigabytes(bytes: u64) -> String {
    if bytes < 10_000 {
        format!("{bytes} bytes")
    } else if bytes < 1_000_000_000 {
        format!("{:.3} MB", bytes as f64 / 1e6)
    } else {
        format!("{:.3} GB", bytes as f64 / 1e9)
    }
}
