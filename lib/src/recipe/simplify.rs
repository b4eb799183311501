//! A recipe in the fewest words that mean the same for a model: what an override says of a whole class belongs to the
//! class. So recipes that mean the same look the same, whatever form they came in.

use std::path::Path;

use super::pattern::Patterns;
use super::{LayerRecipe, Override, Recipe, Rules, SchemeName};
use crate::error::{Error, Result};
use crate::model::{Class, Linear, ModelConfig, Proj, linears};

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
            if hit.iter().all(|&m| self.linears[m].proj == Proj::Embed) {
                let why = "matches only the embedding, a table that stays as it is; only linear layers are quantized";
                return Err(Error::file(file, format!("{} {why}", names(hidden))));
            }
            let by = hit.iter().find_map(|&m| self.hits[m].iter().rposition(|&h| h).filter(|&last| last > o));
            let by = by.map_or("the list of ignored modules".into(), |b| names(&recipe.overrides[b]));
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
pub fn simplify(recipe: Recipe, config: &ModelConfig, file: &Path) -> Result<Recipe> {
    let table = Table::new(&recipe, config)?;
    table.nothing_hidden(&recipe, file)?;
    let active: Vec<usize> = (0..recipe.overrides.len()).collect();
    let truth = table.outcomes(&recipe, &active).into_iter().map(|o| o.cloned()).collect();
    let mut draft = Draft { recipe, table, active, truth };
    draft.ignore_what_is_kept();
    draft.raise_to_class(Class::Experts);
    draft.raise_to_class(Class::Main);
    Ok(draft.finish())
}

/// A recipe on its way to fewer words.
struct Draft {
    recipe: Recipe,
    table: Table,
    /// Overrides that are still needed.
    active: Vec<usize>,
    /// What must come out for each module.
    truth: Vec<Option<LayerRecipe>>,
}

impl Draft {
    fn is_true(&self, active: &[usize]) -> bool {
        self.table.outcomes(&self.recipe, active).into_iter().eq(self.truth.iter().map(Option::as_ref))
    }

    fn hit(&self, o: usize) -> Vec<usize> {
        (0..self.truth.len()).filter(|&m| self.table.hits[m][o]).collect()
    }

    /// An override that only leaves modules alone is a pattern to ignore.
    fn ignore_what_is_kept(&mut self) {
        for o in self.active.clone() {
            let (kept, hit) = (&self.recipe.overrides[o], self.hit(o));
            let keeps = kept.layer.scheme == SchemeName::Keep && kept.ignore.is_empty();
            if keeps && hit.iter().all(|&m| self.truth[m].is_none()) {
                let targets = kept.targets.clone();
                self.recipe.ignore.extend(targets);
                hit.into_iter().for_each(|m| self.table.ignored[m] = true);
                self.active.retain(|&a| a != o);
            }
        }
    }

    /// Where all layers of a class that are rounded at all are rounded alike, the class says how, and projections that
    /// nothing is said of are ignored.
    fn raise_to_class(&mut self, class: Class) {
        let members: Vec<usize> =
            (0..self.truth.len()).filter(|&m| self.table.linears[m].proj.class() == class).collect();
        let mut found: Vec<&LayerRecipe> = members.iter().filter_map(|&m| self.truth[m].as_ref()).collect();
        found.dedup();
        let [only] = found[..] else { return };
        let only = only.clone();
        let was = (self.recipe.clone(), self.table.ignored.clone());
        match class {
            Class::Experts => self.recipe.experts = only,
            Class::Main => self.recipe.mw = only,
        }
        let untouched = |proj| members.iter().all(|&m| self.table.linears[m].proj != proj || self.truth[m].is_none());
        let spoken = |m: usize| self.table.ignored[m] || self.active.iter().any(|&o| self.table.hits[m][o]);
        let unspoken: Vec<usize> = members.iter().copied().filter(|&m| !spoken(m)).collect();
        let mut ignored: Vec<usize> = unspoken.into_iter().filter(|&m| untouched(self.table.linears[m].proj)).collect();
        ignored.sort_by_key(|&m| self.table.linears[m].proj);
        for m in ignored {
            self.recipe.ignore.push(match self.table.linears[m].proj {
                Proj::Router => "mlp.router".into(),
                proj => proj.name().to_owned(),
            });
            self.table.ignored[m] = true;
        }
        if !self.is_true(&self.active) {
            (self.recipe, self.table.ignored) = was;
        }
    }

    /// Leaves out the overrides that change nothing.
    fn finish(mut self) -> Recipe {
        for o in self.active.clone() {
            let without: Vec<usize> = self.active.iter().copied().filter(|&a| a != o).collect();
            if self.is_true(&without) {
                self.active = without;
            }
        }
        let mut number = 0..;
        self.recipe.overrides.retain(|_| number.next().is_some_and(|n| self.active.contains(&n)));
        self.recipe.ignore = distinct(self.recipe.ignore);
        self.recipe
    }
}

/// Each once, in the order of the first.
fn distinct(list: Vec<String>) -> Vec<String> {
    let mut seen = std::collections::BTreeSet::new();
    list.into_iter().filter(|t| seen.insert(t.clone())).collect()
}
