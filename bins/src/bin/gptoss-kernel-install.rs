//! `gptoss-kernel-install`: builds the CUDA kernels and installs them.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use gptoss::kernels::arch::{self, Target};
use gptoss::kernels::build::Request;
use gptoss::kernels::cutlass::{self, Headers};
use gptoss::kernels::store::{self, Installed};
use gptoss::kernels::toolkit::{PINNED, Toolkit};
use gptoss::pipeline::meter::Meter;
use gptoss::verify::env::{Environment, kernel_dir};
use gptoss_tools::{Common, DIFFERENT, agreed, run, write_out};

/// Builds the CUDA kernels from the sources in this program and installs them
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    /// Architectures, such as "8.6;9.0a"; +PTX behind one adds code that later GPUs' drivers compile
    /// [default: TORCH_CUDA_ARCH_LIST, or the GPUs that are here, or 8.0+PTX;8.6;8.9;9.0a;10.0;12.0]
    #[arg(long, value_name = "LIST")]
    arch: Option<String>,
    /// The CUDA compiler [default: CUDA_HOME's, or the one in PATH, or pip's in an active virtual environment]
    #[arg(long, value_name = "PATH")]
    nvcc: Option<PathBuf>,
    /// CUTLASS, for the library for 9.0a; without it that library is left out
    /// [default: CUTLASS_HOME, or pip's in an active virtual environment or beside the compiler]
    #[arg(long, value_name = "DIR")]
    cutlass: Option<PathBuf>,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    /// Show what is installed, with a check of its hashes
    #[arg(long, conflicts_with_all = ["uninstall", "print_env", "arch", "nvcc", "cutlass"])]
    list: bool,
    /// Take a build away: its id or the id's beginning, or all
    #[arg(long, value_name = "ID", conflicts_with = "print_env")]
    uninstall: Option<String>,
    /// Print the variables that name compiler, architectures and folder, for a shell's eval
    #[arg(long)]
    print_env: bool,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "\
Examples:
  gptoss-kernel-install                          for the GPUs that are here; asks before it writes
  gptoss-kernel-install --arch '8.6;9.0a' --yes | jq .kernels.files
  gptoss-kernel-install --list
  gptoss-kernel-install --uninstall all
  eval \"$(gptoss-kernel-install --print-env)\"

Kernels lie in $GPTOSS_KERNELS, or $XDG_DATA_HOME/gptoss/kernels, or ~/.local/share/gptoss/kernels, in a folder for each
combination of sources, compiler, flags, architectures and CUTLASS; the same combination gives the same bytes anywhere
(the library for 9.0a also has code of g++ in it).
Exit codes: 0 done, 1 something that is installed is damaged (--list), 2 an error.";

fn main() -> ExitCode {
    let args = Args::parse();
    run("gptoss-kernel-install", || {
        let root = kernel_dir().context("neither GPTOSS_KERNELS, XDG_DATA_HOME nor HOME says where kernels belong")?;
        if args.list {
            return list(&args, &root);
        }
        if let Some(id) = &args.uninstall {
            return uninstall(&args, &root, id);
        }
        let (targets, origin) = targets(&args)?;
        let toolkit = Toolkit::find(args.nvcc.as_deref())?;
        let cutlass = Headers::find(args.cutlass.as_deref(), &toolkit)?;
        let request = Request { toolkit, cutlass, targets };
        if args.print_env {
            return print_env(&request, &root);
        }
        install(&args, &request, &root, &origin)
    })
}

/// What to build for, and who said so.
fn targets(args: &Args) -> Result<(Vec<Target>, String)> {
    const VARIABLE: &str = "TORCH_CUDA_ARCH_LIST";
    let (text, origin) = match (&args.arch, std::env::var(VARIABLE)) {
        (Some(text), _) => (text.to_owned(), "--arch".to_owned()),
        (None, Ok(text)) if !text.trim().is_empty() => {
            let (rest, older) = arch::without_older(&text);
            if !older.is_empty() && !rest.is_empty() {
                let note =
                    format!("note: {VARIABLE}: the kernels need 8.0 or later, so {} is left out", older.join(", "));
                args.common.resources().progress.note(&note);
            }
            // Where nothing is left, the error names what was there.
            (if rest.is_empty() { text } else { rest }, VARIABLE.to_owned())
        }
        _ => {
            let gpus = Environment::detect().gpus;
            match gpus.is_empty() {
                false => (arch::of_gpus(gpus.iter().map(|g| &g.compute_capability[..])), "the GPUs here".to_owned()),
                true => (arch::DEFAULT.to_owned(), "the default".to_owned()),
            }
        }
    };
    Ok((arch::parse_list(&text, &origin)?, origin))
}

fn names(targets: &[Target]) -> String {
    targets.iter().map(Target::to_string).collect::<Vec<_>>().join(", ")
}

fn install(args: &Args, request: &Request, root: &std::path::Path, origin: &str) -> Result<ExitCode> {
    let (resources, meter) = (args.common.resources(), Meter::start());
    let Request { toolkit, cutlass, targets } = request;
    let hopper = targets.iter().any(Target::is_hopper);
    let headers =
        cutlass.as_ref().filter(|_| hopper).map(|c| format!(" and CUTLASS {}", c.what.version)).unwrap_or_default();
    let what = format!(
        "build kernels for {} ({origin}) with nvcc {} ({}){headers} into {}",
        names(targets),
        toolkit.version,
        toolkit.nvcc.display(),
        root.display()
    );
    if toolkit.version != PINNED {
        resources.progress.note(&format!(
            "note: nvcc {} is not the pinned {PINNED}: the kernels will work, but have other bytes than those with known hashes",
            toolkit.version
        ));
    }
    match cutlass {
        None if hopper => resources.progress.note(&format!(
            "note: CUTLASS is not found, so the library for 9.0a is left out: pip install --no-deps nvidia-cutlass=={}.0, or say --cutlass DIR",
            cutlass::PINNED[0]
        )),
        Some(c) if hopper && !cutlass::PINNED.contains(&&c.what.version[..]) => resources.progress.note(&format!(
            "note: CUTLASS {} is none of {}: the machine code of the library for 9.0a may have other bytes than those with known hashes",
            c.what.version,
            cutlass::PINNED.join(", ")
        )),
        _ => {}
    }
    if args.yes {
        resources.progress.note(&what);
    } else if !agreed(&what)? {
        bail!("declined; nothing was written");
    }
    let Installed { path, mut manifest, .. } = request.install(root, resources.threads, &resources.progress)?;
    let reading = meter.read();
    manifest.volatile = Some(gptoss::manifest::Volatile {
        output_path: Some(path.display().to_string()),
        seconds: reading.seconds,
        peak_resident_bytes: reading.peak_resident,
        peak_anonymous_bytes: reading.peak_anonymous,
        threads: resources.threads,
        ..Default::default()
    });
    args.common.emit(&manifest)?;
    Ok(ExitCode::SUCCESS)
}

/// One line a build, or the manifests as a JSON array.
fn list(args: &Args, root: &std::path::Path) -> Result<ExitCode> {
    let builds = store::list(root)?;
    let damage: Vec<Vec<String>> = builds.iter().map(Installed::damage).collect();
    let unreadable = store::unreadable(root)?;
    if args.common.is_table() {
        let mut text = String::new();
        for (b, damage) in builds.iter().zip(&damage) {
            let state = if damage.is_empty() { "hashes match" } else { "damaged" };
            let (build, path) = (&b.build, b.path.display());
            text += &format!("{}  nvcc {}  {}  {state}  {path}\n", build.id, build.nvcc, build.targets.join(";"));
            damage.iter().for_each(|d| text += &format!("  {d}\n"));
        }
        unreadable.iter().for_each(|(path, error)| text += &format!("{}  damaged: {error}\n", path.display()));
        if builds.is_empty() && unreadable.is_empty() {
            text = format!("no kernels in {}\n", root.display());
        }
        write_out(&text)?;
    } else {
        let one = |(b, damage): (&Installed, &Vec<String>)| serde_json::json!({ "path": b.path, "damage": damage, "manifest": b.manifest });
        let mut all: Vec<serde_json::Value> = builds.iter().zip(&damage).map(one).collect();
        all.extend(unreadable.iter().map(|(path, e)| serde_json::json!({ "path": path, "damage": [e.to_string()] })));
        write_out(&(serde_json::to_string_pretty(&all)? + "\n"))?;
    }
    let sound = unreadable.is_empty() && damage.iter().all(Vec::is_empty);
    Ok(if sound { ExitCode::SUCCESS } else { ExitCode::from(DIFFERENT) })
}

fn uninstall(args: &Args, root: &std::path::Path, id: &str) -> Result<ExitCode> {
    let progress = args.common.resources().progress;
    for gone in store::uninstall(root, id)? {
        progress.note(&format!("took away {}", gone.display()));
    }
    Ok(ExitCode::SUCCESS)
}

fn print_env(request: &Request, root: &std::path::Path) -> Result<ExitCode> {
    let quoted = |text: String| format!("'{}'", text.replace('\'', r"'\''"));
    let home = request.toolkit.nvcc.ancestors().nth(2).context("the compiler lies in no toolkit")?;
    let list: Vec<String> = request.targets.iter().map(Target::to_string).collect();
    write_out(&format!(
        "export GPTOSS_KERNELS={}\nexport CUDA_HOME={}\nexport TORCH_CUDA_ARCH_LIST={}\n",
        quoted(root.display().to_string()),
        quoted(home.display().to_string()),
        quoted(list.join(";"))
    ))?;
    Ok(ExitCode::SUCCESS)
}
