//! GPU architectures: what kernels are compiled for.

use std::fmt;

use crate::error::{Error, Result};

/// What is built where nothing else is said: every GPU from the A100 on, and for those to come PTX that their driver compiles.
pub const DEFAULT: &str = "8.0+PTX;8.6;8.9;9.0a;10.0;12.0";

/// Architectures that the kernels and nvcc 13.0 know; `a` stands for instructions that no later one has.
const KNOWN: [&str; 14] =
    ["8.0", "8.6", "8.7", "8.9", "9.0", "9.0a", "10.0", "10.0a", "10.3", "10.3a", "12.0", "12.0a", "12.1", "12.1a"];

/// PyTorch's names for generations.
const NAMES: [(&str, &str); 4] =
    [("Ampere", "8.0;8.6+PTX"), ("Ada", "8.9+PTX"), ("Hopper", "9.0+PTX"), ("Blackwell", "10.0;10.3;12.0;12.1+PTX")];

/// One result of a compilation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// As nvcc writes it, such as `86` or `90a`.
    code: String,
    /// PTX, which drivers compile, in place of machine code.
    ptx: bool,
}

impl Target {
    /// What nvcc is asked for.
    pub fn flags(&self) -> Vec<String> {
        let code = &self.code;
        if self.ptx {
            return vec![format!("-gencode=arch=compute_{code},code=compute_{code}"), "-ptx".into()];
        }
        vec![format!("-gencode=arch=compute_{code},code=sm_{code}"), "-cubin".into()]
    }

    /// Whether it is machine code for Hopper with the instructions that it alone has.
    pub fn is_hopper(&self) -> bool {
        self.code == "90a" && !self.ptx
    }

    /// The name of its file of `kernel`, such as `w4a8.sm_90a.cubin`.
    pub fn file(&self, kernel: &str) -> String {
        if self.ptx {
            format!("{kernel}.compute_{}.ptx", self.code)
        } else {
            format!("{kernel}.sm_{}.cubin", self.code)
        }
    }

    /// How well it runs on a GPU of compute capability `capability`, such as (8, 6): larger is better, `None` not at all. Machine code runs
    /// on the same major version from its minor one on, that with an `a` on its own version alone, PTX on every later one.
    pub fn fitness(&self, (major, minor): (u32, u32)) -> Option<u32> {
        let (number, own) = (self.order().0, major * 10 + minor);
        let exact = self.code.ends_with('a');
        let runs = match (exact, self.ptx) {
            (true, _) => number == own,
            (false, true) => number <= own,
            (false, false) => number / 10 == major && number <= own,
        };
        runs.then(|| number * 4 + 2 * u32::from(!self.ptx) + u32::from(exact) + if self.ptx { 0 } else { 10_000 })
    }

    /// The least compute capability that it is for, such as 90.
    pub fn number(&self) -> u32 {
        self.order().0
    }

    /// By number, machine code before PTX.
    fn order(&self) -> (u32, &str, bool) {
        let number = self.code.trim_end_matches('a').parse().expect("codes are numbers");
        (number, &self.code, self.ptx)
    }
}

/// As in TORCH_CUDA_ARCH_LIST, with PTX named apart.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let digits = self.code.trim_end_matches('a').len();
        write!(f, "{}.{}{}", &self.code[..digits - 1], &self.code[digits - 1..], if self.ptx { "+PTX" } else { "" })
    }
}

/// A list as PyTorch has it: `8.6;9.0a`, separated by `;`, `,` or blanks; `+PTX` behind one asks for PTX too. Sorted, each once.
///
/// # Errors
/// [`Error::Refused`] for an empty list and for architectures that the kernels are not made for.
pub fn parse_list(text: &str, origin: &str) -> Result<Vec<Target>> {
    let mut targets = Vec::new();
    let words = text.split([';', ',', ' ']).map(str::trim).filter(|w| !w.is_empty());
    for word in words.flat_map(|word| named(word).split(';')) {
        let (name, ptx) = word.strip_suffix("+PTX").map_or((word, false), |name| (name, true));
        let name = name.strip_prefix("sm_").map_or_else(|| name.to_owned(), dotted);
        if !KNOWN.contains(&&name[..]) {
            return Err(Error::Refused(format!(
                "{origin}: {word:?} is no architecture that the kernels are made for; wanted some of {}, such as --arch \"8.6;9.0a\"",
                KNOWN.join(", ")
            )));
        }
        let code = name.replace('.', "");
        if ptx {
            targets.push(Target { code: code.clone(), ptx });
        }
        targets.push(Target { code, ptx: false });
    }
    if targets.is_empty() {
        return Err(Error::Refused(format!("{origin} names no architecture; wanted a list such as \"8.6;9.0a\"")));
    }
    targets.sort_by(|a, b| a.order().cmp(&b.order()));
    targets.dedup();
    Ok(targets)
}

/// What a generation's name stands for; other words as they are.
fn named(word: &str) -> &str {
    NAMES.iter().find(|(name, _)| *name == word).map_or(word, |(_, list)| list)
}

/// A list without what is older than the kernels need, and what that is: PyTorch's containers name every GPU that they serve.
pub fn without_older(text: &str) -> (String, Vec<&str>) {
    let old = |word: &&str| {
        let number = word.strip_suffix("+PTX").unwrap_or(word).parse::<f32>();
        number.is_ok_and(|n| n < 8.0)
    };
    let (older, rest): (Vec<&str>, Vec<&str>) =
        text.split([';', ',', ' ']).filter(|w| !w.is_empty()).partition(|word| old(word));
    (rest.join(";"), older)
}

/// `90a` -> `9.0a`.
fn dotted(code: &str) -> String {
    let digits = code.trim_end_matches('a').len();
    if digits < 2 || !code.is_ascii() {
        code.to_owned()
    } else {
        format!("{}.{}", &code[..digits - 1], &code[digits - 1..])
    }
}

/// The list for GPUs of these compute capabilities, such as "9.0": those of Hopper with the instructions that they alone have.
pub fn of_gpus<'a>(capabilities: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<String> = capabilities.map(|c| if c == "9.0" { "9.0a".into() } else { c.to_owned() }).collect();
    names.sort();
    names.dedup();
    names.join(";")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        parse_list(text, "--arch").unwrap().iter().map(Target::to_string).collect()
    }

    #[test]
    fn lists_are_pytorchs() {
        assert_eq!(names("9.0a;8.6"), ["8.6", "9.0a"]);
        assert_eq!(names("8.0+PTX, 8.0 12.0"), ["8.0", "8.0+PTX", "12.0"]);
        assert_eq!(names("sm_90a sm_100"), ["9.0a", "10.0"]);
        assert_eq!(names(DEFAULT).len(), 7);
        assert_eq!(names("Ampere;Hopper"), ["8.0", "8.6", "8.6+PTX", "9.0", "9.0+PTX"]);
        assert_eq!(without_older("7.5 8.0 9.0+PTX"), ("8.0;9.0+PTX".into(), vec!["7.5"]));
        assert_eq!(without_older("5.2+PTX"), (String::new(), vec!["5.2+PTX"]));
        for bad in ["", ";", "7.5", "8.6;banana", "sm_", "9.0b", "86"] {
            assert!(parse_list(bad, "--arch").unwrap_err().to_string().contains("\"8.6;9.0a\""), "{bad}");
        }
        assert_eq!(of_gpus(["9.0", "8.6", "9.0"].into_iter()), "8.6;9.0a");
    }

    #[test]
    fn machine_code_is_taken_where_it_runs() {
        let best = |list: &str, capability| {
            let targets = parse_list(list, "--arch").unwrap();
            let best = targets.iter().filter(|t| t.fitness(capability).is_some()).max_by_key(|t| t.fitness(capability));
            best.map(Target::to_string)
        };
        assert_eq!(best(DEFAULT, (8, 6)).unwrap(), "8.6");
        assert_eq!(best("8.0+PTX;9.0;9.0a", (9, 0)).unwrap(), "9.0a");
        assert_eq!(best("8.0", (8, 9)).unwrap(), "8.0");
        assert_eq!(best("8.0+PTX;9.0a", (10, 3)).unwrap(), "8.0+PTX");
        assert_eq!(best("8.6;9.0a", (8, 0)), None);
        assert_eq!(best("9.0a", (10, 0)), None);
    }

    #[test]
    fn files_and_flags_name_the_architecture() {
        let [code, ptx] = &parse_list("9.0a+PTX", "--arch").unwrap()[..] else { panic!("two results") };
        assert_eq!((code.file("w4a8"), ptx.file("w4a8")), ("w4a8.sm_90a.cubin".into(), "w4a8.compute_90a.ptx".into()));
        assert_eq!(code.flags(), ["-gencode=arch=compute_90a,code=sm_90a", "-cubin"]);
        assert_eq!(ptx.flags(), ["-gencode=arch=compute_90a,code=compute_90a", "-ptx"]);
    }
}
