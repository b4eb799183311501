//! Flags that say which text is used, the same in every tool that reads some.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::ValueEnum;
use gptoss::text::dataset::Split;
use gptoss::text::windows::Layout;
use gptoss::text::{Source, TextRequest};

/// Which text, and how much of it. The names with `_` are those of llm-compressor's `oneshot`.
#[derive(Debug, Clone, clap::Args)]
pub struct TextArgs {
    /// Text of your own: .jsonl or .json (an object a line, with "text" or a chat in "messages"), .parquet, or plain text;
    /// .gz is unpacked
    #[arg(long, visible_alias = "calib-jsonl", value_name = "FILE", conflicts_with = "dataset", help_heading = "Text")]
    text: Option<PathBuf>,
    /// A dataset from the hub: open_platypus, wikitext2, c4, gsm8k, ultrachat; with @COMMIT behind it, of that commit
    #[arg(long, value_name = "NAME", help_heading = "Text")]
    dataset: Option<String>,
    /// Configuration of the dataset, such as main or socratic of gsm8k [default: its first]
    #[arg(
        long,
        alias = "dataset_config_name",
        value_name = "NAME",
        requires = "dataset",
        conflicts_with = "text",
        help_heading = "Text"
    )]
    dataset_config_name: Option<String>,
    /// Most sequences [default: 256 to calibrate, all to measure]
    #[arg(
        long,
        visible_alias = "nsamples",
        alias = "num_calibration_samples",
        value_name = "N",
        value_parser = parse_count,
        help_heading = "Text"
    )]
    num_calibration_samples: Option<usize>,
    /// Most tokens in a sequence
    #[arg(
        long,
        alias = "max_seq_length",
        value_name = "N",
        default_value = "2048",
        value_parser = parse_count,
        help_heading = "Text"
    )]
    max_seq_length: usize,
    /// How documents become sequences
    #[arg(long, value_enum, value_name = "HOW", default_value = "pack", help_heading = "Text")]
    packing: Packing,
    /// Fill short sequences with the padding token
    #[arg(
        long,
        alias = "pad_to_max_length",
        value_name = "BOOL",
        num_args = 0..=1,
        default_value = "false",
        default_missing_value = "true",
        value_parser = parse_bool,
        help_heading = "Text"
    )]
    pad_to_max_length: bool,
    /// Draw documents at random by this seed [default: in their order]
    #[arg(long, value_name = "N", help_heading = "Text")]
    shuffle_seed: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Packing {
    /// One behind the other with the end-of-text token between, cut into full windows
    Pack,
    /// One sequence a document, cut where it is too long
    Truncate,
}

impl TextArgs {
    /// True where --text or --dataset was given.
    pub fn is_given(&self) -> bool {
        self.text.is_some() || self.dataset.is_some()
    }

    /// What the flags ask for. `samples` is how many sequences the tool takes where the flags do not say; `split` is the
    /// part of a dataset that it wants.
    pub fn request(&self, samples: Option<usize>, split: Split) -> Result<TextRequest> {
        if !self.is_given() {
            bail!("text is needed: give --text FILE or --dataset NAME");
        }
        Ok(self.request_or("", samples, split))
    }

    /// The same, from the dataset `default` where no flag names a source.
    pub fn request_or(&self, default: &str, samples: Option<usize>, split: Split) -> TextRequest {
        let dataset = || self.dataset.clone().unwrap_or_else(|| default.to_owned());
        let source = match &self.text {
            Some(file) => Source::File(file.clone()),
            None => Source::Dataset { name: dataset(), config: self.dataset_config_name.clone(), split },
        };
        TextRequest {
            source,
            samples: self.num_calibration_samples.or(samples),
            max_seq_length: self.max_seq_length,
            layout: match self.packing {
                Packing::Pack => Layout::Pack,
                Packing::Truncate => Layout::Truncate,
            },
            pad: self.pad_to_max_length,
            seed: self.shuffle_seed,
        }
    }
}

fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=0x7fff_ffff) => Ok(n),
        _ => Err("wanted a number from 1 to 2147483647".into()),
    }
}

/// `true` and `false`, as Python writes them too.
pub fn parse_bool(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("wanted true or false".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Tool {
        #[command(flatten)]
        text: TextArgs,
    }

    fn request(line: &str) -> Result<TextRequest, String> {
        let words = ["tool"].into_iter().chain(line.split_whitespace());
        let tool = Tool::try_parse_from(words).map_err(|e| e.to_string())?;
        tool.text.request(Some(7), Split::Train).map_err(|e| e.to_string())
    }

    #[test]
    fn the_flags_of_oneshot_mean_what_they_mean_there() {
        let got = request(
            "--dataset gsm8k --dataset_config_name main --num_calibration_samples 10 --pad_to_max_length False \
             --max_seq_length 384",
        );
        let source = Source::Dataset { name: "gsm8k".into(), config: Some("main".into()), split: Split::Train };
        let want = TextRequest {
            source,
            samples: Some(10),
            max_seq_length: 384,
            layout: Layout::Pack,
            pad: false,
            seed: None,
        };
        assert_eq!(got, Ok(want));
    }

    #[test]
    fn a_file_has_defaults() {
        let got = request("--calib-jsonl x.jsonl --packing truncate --pad-to-max-length --shuffle-seed 3").unwrap();
        let want = TextRequest {
            source: Source::File("x.jsonl".into()),
            samples: Some(7),
            max_seq_length: 2048,
            layout: Layout::Truncate,
            pad: true,
            seed: Some(3),
        };
        assert_eq!(got, want);
        assert_eq!(request("--text x --nsamples 128").unwrap().samples, Some(128));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        for (line, want) in [
            ("", "give --text FILE or --dataset NAME"),
            ("--text x --dataset c4", "cannot be used with"),
            ("--text x --dataset-config-name en", "cannot be used with"),
            ("--text x --nsamples 0", "wanted a number from 1"),
            ("--text x --pad-to-max-length maybe", "wanted true or false"),
            ("--text x --packing loose", "possible values: pack, truncate"),
        ] {
            let e = request(line).unwrap_err();
            assert!(e.contains(want), "{line}: {e}");
        }
    }
}
