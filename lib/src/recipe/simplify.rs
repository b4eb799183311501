//! A recipe in the fewest words that mean the same for a model: what an override says of a whole class belongs to the
//! class. So recipes that mean the same look the same, whatever form they came in.

use std::path::Path;

use super::pattern::Patterns;
use super::{LayerRecipe, Override, Recipe, Rules, SchemeName};
use crate::error::{Error, Result};
use crate::model::{Class, Linear, ModelConfig, linears};

/// Which override matches which module.
struct Table {
    linears: Vec<Linear>,
    /// A module, then an override.
    hits: Vec<Vec<bool>>,
    ignored: Vec<bool>,
}

impl Table {
    fn new(recipe: &Recipe, config: &ModelConfig) -> Result<Self> {
        let both = |o: &Override| Ok((Patterns::new(&o.targets)?, Patterns::new(&o.ignore)?));
        let overrides = recipe.overrides.iter().map(both).collect::<Result<Vec<_>>>()?;
        let ignore = Patterns::new(&recipe.ignore)?;
        let linears: Vec<Linear> = linears(config).collect();
        let modules: Vec<String> = linears.iter().map(Linear::module).collect();
        Rules::new(recipe)?.every_pattern_hits(modules.iter().map(String::as_str))?;
        let hits = |m: &String| overrides.iter().map(|(t, i)| t.any(m) && !i.any(m)).collect();
        Ok(Self {
            hits: modules.iter().map(hits).collect(),
            ignored: modules.iter().map(|m| ignore.any(m)).collect(),
            linears,
        })
    }

    /// How each module is quantized, when only the overrides at `active` are there.
    fn outcomes<'r>(&self, recipe: &'r Recipe, active: &[usize]) -> Vec<Option<&'r LayerRecipe>> {
        let outcome = |(i, linear): (usize, &Linear)| {
            let last = active.iter().rev().find(|&&o| self.hits[i][o]);
            let layer = last.map_or_else(|| recipe.class(linear.proj.class()), |&o| &recipe.overrides[o].layer);
            (!self.ignored[i] && layer.scheme != SchemeName::Keep).then_some(layer)
        };
        self.linears.iter().enumerate().map(outcome).collect()
    }

    /// Refuses an override that later ones (or the ignored modules) leave nothing of, unless they agree with it.
    fn nothing_hidden(&self, recipe: &Recipe, file: &Path) -> Result<()> {
        let all: Vec<usize> = (0..recipe.overrides.len()).collect();
        let outcomes = self.outcomes(recipe, &all);
        for (o, hidden) in recipe.overrides.iter().enumerate() {
            let wanted = Some(&hidden.layer).filter(|l| l.scheme != SchemeName::Keep);
            let hit: Vec<usize> = (0..self.linears.len()).filter(|&m| self.hits[m][o]).collect();
            let wins = |&m: &usize| !self.ignored[m] && !self.hits[m][o + 1..].contains(&true);
            if hit.iter().any(wins) || hit.iter().all(|&m| outcomes[m] == wanted) {
                continue;
            }
            let by = hit.iter().find_map(|&m| self.hits[m].iter().rposition(|&h| h).filter(|&last| last > o));
            let by = by.map_or("the ignored modules".into(), |b| names(&recipe.overrides[b]));
            return Err(Error::file(
                file,
                format!(
                    "{} has no effect: {by} hides it on every module that it matches; of several that match, the last counts",
                    names(hidden)
                ),
            ));
        }
        Ok(())
    }
}

fn names(o: &Override) -> String {
    let plain = |t: &String| t.strip_prefix("glob:").unwrap_or(t).to_owned();
    format!("{:?}", o.targets.iter().map(plain).collect::<Vec<_>>().join(", "))
}

/// Simplifies the recipe that stands in `file`.
///
/// # Errors
/// [`Error::BadFile`] for an override that others hide; [`Error::Refused`] for a pattern that matches nothing.
pub fn simplify(mut recipe: Recipe, config: &ModelConfig, file: &Path) -> Result<Recipe> {
    let mut table = Table::new(&recipe, config)?;
    table.nothing_hidden(&recipe, file)?;
    let mut active: Vec<usize> = (0..recipe.overrides.len()).collect();
    let truth: Vec<Option<LayerRecipe>> = table.outcomes(&recipe, &active).into_iter().map(|o| o.cloned()).collect();
    let same = |table: &Table, recipe: &Recipe, active: &[usize]| {
        table.outcomes(recipe, active).into_iter().eq(truth.iter().map(Option::as_ref))
    };
    // An override that only leaves modules alone is a pattern to ignore.
    for o in active.clone() {
        let kept = &recipe.overrides[o];
        let hit: Vec<usize> = (0..truth.len()).filter(|&m| table.hits[m][o]).collect();
        if kept.layer.scheme == SchemeName::Keep && kept.ignore.is_empty() && hit.iter().all(|&m| truth[m].is_none()) {
            recipe.ignore.extend(kept.targets.iter().cloned());
            hit.into_iter().for_each(|m| table.ignored[m] = true);
            active.retain(|&a| a != o);
        }
    }
    for class in [Class::Experts, Class::Main] {
        let of_class = |(l, t): (&Linear, &Option<LayerRecipe>)| t.clone().filter(|_| l.proj.class() == class);
        let mut found: Vec<LayerRecipe> = table.linears.iter().zip(&truth).filter_map(of_class).collect();
        found.dedup();
        let [only] = &found[..] else { continue };
        let slot = |r: &mut Recipe, layer| match class {
            Class::Experts => std::mem::replace(&mut r.experts, layer),
            Class::Main => std::mem::replace(&mut r.mw, layer),
        };
        let was = slot(&mut recipe, only.clone());
        if !same(&table, &recipe, &active) {
            slot(&mut recipe, was);
        }
    }
    for o in active.clone() {
        let without: Vec<usize> = active.iter().copied().filter(|&a| a != o).collect();
        if same(&table, &recipe, &without) {
            active = without;
        }
    }
    let mut number = 0..;
    recipe.overrides.retain(|_| number.next().is_some_and(|n| active.contains(&n)));
    recipe.ignore = distinct(recipe.ignore);
    Ok(recipe)
}

/// Each once, in the order of the first.
fn distinct(list: Vec<String>) -> Vec<String> {
    let mut seen = std::collections::BTreeSet::new();
    list.into_iter().filter(|t| seen.insert(t.clone())).collect()
}
