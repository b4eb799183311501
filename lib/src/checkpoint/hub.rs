//! Names on the hub -> local files, through hf-hub and the cache that Python's huggingface_hub shares.
//!
//! Honoured: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. Every file is of one commit, and its size and hash
//! (SHA-256 of large files, git's SHA-1 of small ones) are checked before it is used.

mod client;
mod http;

use std::path::{Path, PathBuf};

use hf_hub::RepoType;

use self::client::Hub;
pub use self::client::Settings;
use super::files;
use super::source::is_side_file;
use super::{CONFIG, INDEX};
use crate::error::{Error, Result};
use crate::pipeline::progress::Progress;

/// A checkpoint that was asked for by path or by hub id.
#[derive(Debug, Clone)]
pub struct Located {
    /// The folder with its files.
    pub dir: PathBuf,
    /// `org/name@commit` where it came from the hub.
    pub hub: Option<String>,
}

/// What of a checkpoint is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// All of it.
    Everything,
    /// `config.json`: enough for a plan.
    ConfigOnly,
}

/// A repository on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `org/name`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
}

impl HubId {
    /// Parses `org/name[@revision]`; `None` where `text` cannot be a hub id.
    pub fn parse(text: &str) -> Option<Self> {
        let (repo, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (org, name) = repo.split_once('/')?;
        let word = |s: &str| {
            !s.is_empty() && !s.starts_with('.') && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let revision_ok = !revision.is_empty()
            && !revision.contains("..")
            && revision.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
            && !revision.starts_with('/');
        (word(org) && word(name) && revision_ok).then(|| Self { repo: repo.into(), revision: revision.into() })
    }
}

/// A folder as it is, or a hub id's files, downloaded where they are not in the cache.
pub fn locate(text: &str, wanted: Wanted, progress: &Progress) -> Result<Located> {
    let path = Path::new(text);
    match HubId::parse(text) {
        Some(id) if !files::is_there(path)? => match fetch(&id, &Settings::from_env()?, wanted, progress) {
            Err(Error::Hub { repo, reason }) => Err(Error::Hub {
                repo,
                reason: format!("{reason} (there is no folder {text} here, so it was taken for a hub id)"),
            }),
            other => other,
        },
        _ => Ok(Located { dir: path.to_path_buf(), hub: None }),
    }
}

fn fetch(id: &HubId, settings: &Settings, needed: Wanted, progress: &Progress) -> Result<Located> {
    let hub = Hub { id, kind: RepoType::Model, settings };
    let (dir, commit) = if settings.offline {
        hub.cached()?
    } else {
        let listing = hub.list()?;
        let mut wanted: Vec<&str> = listing.names.iter().map(String::as_str).filter(|n| is_wanted(n)).collect();
        wanted.sort_unstable();
        if !wanted.contains(&CONFIG) || !wanted.iter().any(|n| n.ends_with(".safetensors")) {
            return Err(hub.error("has no config.json with *.safetensors beside it, so it is no checkpoint"));
        }
        if needed == Wanted::ConfigOnly {
            wanted.retain(|&n| n == CONFIG);
        }
        (hub.get(&listing, &wanted, progress)?, listing.commit)
    };
    Ok(Located { dir, hub: Some(format!("{}@{commit}", id.repo)) })
}

/// Files that make a checkpoint: not the original weights in sub-folders, not pictures.
fn is_wanted(name: &str) -> bool {
    let plain = !name.contains(['/', '\\']) && !name.starts_with('.');
    plain
        && (name == CONFIG
            || name == INDEX
            || (name.starts_with("model") && name.ends_with(".safetensors"))
            || is_side_file(name))
}

/// A file of a dataset's repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its path in the repository.
    pub name: String,
    /// `org/name@commit`.
    pub hub: String,
}

/// The first file of the dataset `id` whose path matches `pattern`, downloaded where it is not in the cache.
///
/// A pattern is a path in which the file's name may have one `*`, for hashes in it: `data/train-00000-*.parquet`.
pub fn dataset_file(id: &HubId, pattern: &str, settings: &Settings, progress: &Progress) -> Result<DatasetFile> {
    let hub = Hub { id, kind: RepoType::Dataset, settings };
    let (dir, commit, name) = if settings.offline {
        let (dir, commit) = hub.cached()?;
        let name = first_match(files_beside(&dir, pattern), pattern);
        let name = name.ok_or_else(|| hub.not_cached(pattern))?;
        hub.check_file(&dir.join(&name))?;
        (dir, commit, name)
    } else {
        let mut listing = hub.list()?;
        let name = first_match(std::mem::take(&mut listing.names), pattern);
        let name = name.ok_or_else(|| hub.error(format!("has no file {pattern}: the dataset was rearranged")))?;
        (hub.get(&listing, &[&name], progress)?, listing.commit, name)
    };
    Ok(DatasetFile { path: dir.join(&name), name, hub: format!("{}@{commit}", id.repo) })
}

/// The names of the files of `dir` that lie in the folder of `pattern`.
fn files_beside(dir: &Path, pattern: &str) -> Vec<String> {
    let folder = pattern.rsplit_once('/').map_or("", |(folder, _)| folder);
    let entries = std::fs::read_dir(dir.join(folder)).into_iter().flatten().flatten();
    let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
    names.map(|n| if folder.is_empty() { n } else { format!("{folder}/{n}") }).collect()
}

/// What `*` stands for has no `/`, so no name climbs out of its folder.
fn first_match(names: Vec<String>, pattern: &str) -> Option<String> {
    let matches = |name: &str| match pattern.split_once('*') {
        None => name == pattern,
        Some((start, end)) => name
            .strip_prefix(start)
            .and_then(|rest| rest.strip_suffix(end))
            .is_some_and(|middle| !middle.contains(['/', '\\'])),
    };
    names.into_iter().filter(|n| matches(n)).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_paths_are_told_apart() {
        let id = |s: &str| HubId::parse(s).map(|i| (i.repo, i.revision));
        assert_eq!(id("openai/gpt-oss-20b"), Some(("openai/gpt-oss-20b".into(), "main".into())));
        assert_eq!(id("a/b@refs/pr/1"), Some(("a/b".into(), "refs/pr/1".into())));
        for path in ["./a", "/a/b", "a", "a/b/c", "../x", "a/b@", "a/b@../x", "a b/c", "a/.b"] {
            assert_eq!(id(path), None, "{path}");
        }
    }

    #[test]
    fn only_the_checkpoint_is_wanted() {
        for name in [
            "config.json",
            INDEX,
            "model-00000-of-00002.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
            "LICENSE",
        ] {
            assert!(is_wanted(name), "{name}");
        }
        for name in ["original/model.safetensors", "metal/model.bin", "README.md", "../config.json", ".gitattributes"] {
            assert!(!is_wanted(name), "{name}");
        }
    }

    #[test]
    fn a_pattern_finds_the_first_shard() {
        let names = ["data/a-1-x.parquet", "data/a-0-y.parquet", "data/b-0-z.parquet", "data/a-0-/../../p.parquet"];
        let find = |pattern: &str| first_match(names.map(str::to_owned).to_vec(), pattern);
        assert_eq!(find("data/a-*.parquet").as_deref(), Some("data/a-0-y.parquet"));
        assert_eq!(find("data/b-0-z.parquet").as_deref(), Some("data/b-0-z.parquet"));
        assert_eq!(find("data/a-0-/*.parquet"), None);
        assert_eq!(find("data/c-*"), None);
    }
}
