//! The datasets that have a name, as data. To add one: a line in [`DATASETS`].
//!
//! Rows become text as in llm-compressor's `oneshot` where it knows the dataset (open_platypus, gsm8k, c4), with these
//! differences: ultrachat needs a chat template (`oneshot` makes one up where there is none) and gets no empty system
//! message in front, of which gpt-oss would make empty developer instructions; rows of wikitext are joined, as GPTQ's
//! loader does. Of a split in several files the first is read: it has more than a calibration needs.

use super::rows::Rows;
use crate::checkpoint::hub::{self, DatasetFile, HubId, Settings};
use crate::error::{Error, Result};
use crate::pipeline::progress::Progress;

/// Which part of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// For calibration.
    Train,
    /// For measuring: the test split, the validation split where there is no other, or the only one that there is.
    Test,
}

/// A dataset on the hub.
#[derive(Debug, PartialEq, Eq)]
pub struct Dataset {
    /// What users call it.
    pub name: &'static str,
    /// What others call it.
    pub aliases: &'static [&'static str],
    /// `org/name`.
    pub repo: &'static str,
    /// At least one; the first is taken where none is named.
    pub configs: &'static [Config],
    /// How a row becomes a document.
    pub rows: Rows,
}

/// One configuration of a dataset, as `datasets.load_dataset` calls it.
#[derive(Debug, PartialEq, Eq)]
pub struct Config {
    /// Its name; `default` where the repository has but one.
    pub name: &'static str,
    /// The file of [`Split::Train`], in the words of [`hub::dataset_file`].
    pub train: &'static str,
    /// The file of [`Split::Test`].
    pub test: Option<&'static str>,
}

/// All of them.
pub const DATASETS: &[Dataset] = &[
    Dataset {
        name: "open_platypus",
        aliases: &[],
        repo: "garage-bAInd/Open-Platypus",
        configs: &[Config { name: "default", train: "data/train-00000-of-*.parquet", test: None }],
        rows: Rows::Alpaca,
    },
    Dataset {
        name: "wikitext2",
        aliases: &["wikitext"],
        repo: "Salesforce/wikitext",
        configs: &[
            Config {
                name: "wikitext-2-raw-v1",
                train: "wikitext-2-raw-v1/train-00000-of-*.parquet",
                test: Some("wikitext-2-raw-v1/test-00000-of-*.parquet"),
            },
            Config {
                name: "wikitext-2-v1",
                train: "wikitext-2-v1/train-00000-of-*.parquet",
                test: Some("wikitext-2-v1/test-00000-of-*.parquet"),
            },
        ],
        rows: Rows::Joined("text"),
    },
    Dataset {
        name: "c4",
        aliases: &[],
        repo: "allenai/c4",
        configs: &[
            Config {
                name: "en",
                train: "en/c4-train.00000-of-*.json.gz",
                test: Some("en/c4-validation.00000-of-*.json.gz"),
            },
            Config {
                name: "realnewslike",
                train: "realnewslike/c4-train.00000-of-*.json.gz",
                test: Some("realnewslike/c4-validation.00000-of-*.json.gz"),
            },
        ],
        rows: Rows::Field("text"),
    },
    Dataset {
        name: "gsm8k",
        aliases: &[],
        repo: "openai/gsm8k",
        configs: &[
            Config { name: "main", train: "main/train-00000-of-*.parquet", test: Some("main/test-00000-of-*.parquet") },
            Config {
                name: "socratic",
                train: "socratic/train-00000-of-*.parquet",
                test: Some("socratic/test-00000-of-*.parquet"),
            },
        ],
        rows: Rows::QuestionAnswer,
    },
    Dataset {
        name: "ultrachat",
        aliases: &["ultrachat_200k"],
        repo: "HuggingFaceH4/ultrachat_200k",
        configs: &[Config {
            name: "default",
            train: "data/train_sft-00000-of-*.parquet",
            test: Some("data/test_sft-00000-of-*.parquet"),
        }],
        rows: Rows::Field("messages"),
    },
];

/// A dataset, a configuration and a revision that were asked for and are known.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    /// The dataset.
    pub dataset: &'static Dataset,
    /// Its configuration.
    pub config: &'static Config,
    id: HubId,
    pattern: &'static str,
}

impl Choice {
    /// Finds `name`, which may have `@revision` behind it. Nothing is downloaded yet.
    pub fn find(name: &str, config: Option<&str>, split: Split) -> Result<Self> {
        let (plain, revision) = name.split_once('@').unwrap_or((name, "main"));
        let dataset = DATASETS.iter().find(|d| d.name == plain || d.aliases.contains(&plain)).ok_or_else(|| {
            let names: Vec<&str> = DATASETS.iter().map(|d| d.name).collect();
            Error::Refused(format!(
                "no dataset has the name {plain:?}; there are {} (for a file of your own: --text FILE)",
                names.join(", ")
            ))
        })?;
        let id = HubId::parse(&format!("{}@{revision}", dataset.repo))
            .ok_or_else(|| Error::Refused(format!("dataset {name}: {revision:?} is no revision of a repository")))?;
        let config = match config {
            None => &dataset.configs[0],
            Some(wanted) => dataset.configs.iter().find(|c| c.name == wanted).ok_or_else(|| {
                let names: Vec<&str> = dataset.configs.iter().map(|c| c.name).collect();
                Error::Refused(format!(
                    "dataset {} has no configuration {wanted:?}; there are {}",
                    dataset.name,
                    names.join(", ")
                ))
            })?,
        };
        let pattern = match split {
            Split::Train => config.train,
            Split::Test => config.test.unwrap_or(config.train),
        };
        Ok(Self { dataset, config, id, pattern })
    }

    /// Downloads the file, or finds it in the cache.
    pub fn fetch(&self, settings: &Settings, progress: &Progress) -> Result<DatasetFile> {
        hub::dataset_file(&self.id, self.pattern, settings, progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_configurations_and_splits_are_found_or_listed() {
        let find = |name, config, split| Choice::find(name, config, split).map(|c| (c.id.repo, c.pattern));
        let found = find("wikitext", None, Split::Test).unwrap();
        assert_eq!(found, ("Salesforce/wikitext".into(), "wikitext-2-raw-v1/test-00000-of-*.parquet"));
        assert_eq!(find("gsm8k", Some("socratic"), Split::Train).unwrap().1, "socratic/train-00000-of-*.parquet");
        assert_eq!(Choice::find("c4@abc", None, Split::Train).unwrap().id.revision, "abc");
        let error = |name, config, split| find(name, config, split).unwrap_err().to_string();
        let e = error("pile", None, Split::Train);
        assert!(e.contains("\"pile\"; there are open_platypus, wikitext2, c4, gsm8k, ultrachat"), "{e}");
        let e = error("gsm8k", Some("x"), Split::Train);
        assert!(e.contains("no configuration \"x\"; there are main, socratic"), "{e}");
        assert_eq!(find("open_platypus", None, Split::Test).unwrap().1, "data/train-00000-of-*.parquet");
        assert!(error("c4@../x", None, Split::Train).contains("no revision"));
    }

    #[test]
    fn the_table_is_sound() {
        for dataset in DATASETS {
            assert!(HubId::parse(dataset.repo).is_some(), "{}", dataset.name);
            assert!(!dataset.configs.is_empty(), "{}", dataset.name);
            for pattern in dataset.configs.iter().flat_map(|c| c.test.into_iter().chain([c.train])) {
                assert_eq!(pattern.matches('*').count(), 1, "{pattern}");
                assert!(pattern.find('/') < pattern.find('*'), "{pattern}");
            }
        }
    }
}
