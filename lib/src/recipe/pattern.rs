//! Names of modules: `re:` and a regular expression that must match from the start, as compressed-tensors has it, or
//! whole name components anywhere in the name (`mlp.router`, `layers.0`, `q_proj`).

use std::cell::RefCell;
use std::collections::HashMap;

use regex_lite::Regex;

use crate::error::{Error, Result};

thread_local! {
    /// A model has thousands of modules and a handful of patterns: each is compiled once.
    static COMPILED: RefCell<HashMap<String, Patterns>> = RefCell::default();
}

/// True where `pattern` matches `module`.
pub fn matches(pattern: &str, module: &str) -> Result<bool> {
    COMPILED.with_borrow_mut(|compiled| {
        if let Some(patterns) = compiled.get(pattern) {
            return Ok(patterns.any(module));
        }
        let patterns = Patterns::new(&[pattern.to_owned()])?;
        let matches = patterns.any(module);
        compiled.insert(pattern.to_owned(), patterns);
        Ok(matches)
    })
}

/// Many patterns, compiled once.
pub struct Patterns {
    list: Vec<(String, Option<Regex>)>,
}

impl Patterns {
    /// Compiles `patterns`.
    pub fn new(patterns: &[String]) -> Result<Self> {
        let list = patterns
            .iter()
            .map(|p| {
                let re = p.strip_prefix("re:").map(|re| Regex::new(&format!("^(?:{re})"))).transpose();
                re.map(|re| (p.clone(), re)).map_err(|e| Error::Refused(format!("{p:?} is no regular expression: {e}")))
            })
            .collect::<Result<_>>()?;
        Ok(Self { list })
    }

    /// Numbers of the patterns that match `module`.
    pub fn hits<'a>(&'a self, module: &'a str) -> impl Iterator<Item = usize> + 'a {
        self.list.iter().enumerate().filter(move |(_, (p, re))| one(p, re.as_ref(), module)).map(|(i, _)| i)
    }

    /// True where any matches.
    pub fn any(&self, module: &str) -> bool {
        self.hits(module).next().is_some()
    }
}

fn one(pattern: &str, re: Option<&Regex>, module: &str) -> bool {
    match re {
        Some(re) => re.is_match(module),
        None => {
            let n = pattern.split('.').count();
            let parts: Vec<&str> = module.split('.').collect();
            parts.windows(n).any(|w| pattern.split('.').eq(w.iter().copied()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn components_match_whole_and_expressions_from_the_start() {
        let m = "model.layers.1.mlp.experts.12.gate_proj";
        for (p, want) in [
            ("mlp.experts", true),
            ("experts.12", true),
            ("experts.1", false),
            ("gate", false),
            ("re:.*gate_proj$", true),
            ("re:gate_proj", false),
            (r"re:model\.layers\.1\.", true),
        ] {
            assert_eq!(matches(p, m).unwrap(), want, "{p}");
            assert_eq!(Patterns::new(&[p.to_owned()]).unwrap().any(m), want, "{p}");
        }
        assert!(Patterns::new(&["re:(".into()]).is_err());
    }
}
