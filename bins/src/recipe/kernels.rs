//! Are the kernels of w4a8 there, and if not, what then?

use std::path::PathBuf;

use anyhow::{Context, Result};
use gptoss::pipeline::progress::Progress;
use gptoss::recipe::{Kernels, Recipe};
use gptoss::verify::env::kernels_installed;

use super::{Installed, KernelArgs};
use crate::agreed;

const INSTALLER: &str = "gptoss-kernel-install";

/// Settles the kernels in the recipe. The machine is looked at only where the recipe depends on it.
pub fn settle(recipe: &mut Recipe, args: &KernelArgs, dry_run: bool, progress: &Progress) -> Result<()> {
    if !recipe.has_w4a8() {
        let named = if args.kernels == Installed::Present { Kernels::Present } else { Kernels::Absent };
        return Ok(recipe.settle(named, false)?);
    }
    // A recipe that breaks another rule must not install anything.
    recipe.clone().settle(Kernels::Present, false)?;
    let (kernels, why) = match args.kernels {
        Installed::Present => (Kernels::Present, None),
        Installed::Absent => (Kernels::Absent, None),
        Installed::Detect if kernels_installed() => (Kernels::Present, None),
        Installed::Detect if !args.try_install_qqq => (Kernels::Absent, None),
        Installed::Detect if dry_run => (Kernels::Absent, Some("a dry run installs nothing".to_owned())),
        Installed::Detect => match install(args.yes)? {
            None if kernels_installed() => (Kernels::Present, None),
            None => (Kernels::Absent, Some(format!("{INSTALLER} left no kernels behind"))),
            why => (Kernels::Absent, why),
        },
    };
    if let Some(why) = &why {
        progress.note(&format!("note: --try-install-qqq: {why}"));
    }
    let settled = recipe.settle(kernels, args.allow_fallback);
    match why {
        Some(why) => settled.with_context(|| format!("--try-install-qqq: {why}")),
        None => Ok(settled?),
    }
}

/// Runs the installer; the reason where that was not possible.
fn install(yes: bool) -> Result<Option<String>> {
    let Some(program) = installer() else {
        return Ok(Some(format!("there is no {INSTALLER} beside this program or in PATH")));
    };
    if !yes && !agreed("install the kernels of w4a8")? {
        return Ok(Some("declined".into()));
    }
    // Standard output is for the manifest.
    let ran = duct::cmd!(&program, "--yes").stdin_null().stdout_to_stderr().unchecked().run();
    let status = ran.with_context(|| format!("cannot run {}", program.display()))?.status;
    Ok((!status.success()).then(|| format!("{INSTALLER} failed ({status})")))
}

fn installer() -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(INSTALLER)));
    beside.filter(|p| p.is_file()).or_else(|| which::which(INSTALLER).ok())
}
