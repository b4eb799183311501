use super::*;
use clap::Parser;
use gptoss::algorithms::Algorithm;
use gptoss::recipe::{ActOrder, FewTokens, Kernels, Observer, Pruner};

#[derive(Parser)]
struct Tool {
    #[command(flatten)]
    recipe: RecipeArgs,
}

fn resolved(line: &str) -> Result<Recipe, String> {
    let tool = Tool::try_parse_from(["tool"].into_iter().chain(line.split_whitespace())).map_err(|e| e.to_string())?;
    let config = ModelConfig::parse(Path::new("m"), &ModelConfig::published("gpt-oss-20b").unwrap()).unwrap();
    let recipe = tool.recipe.check().and_then(|()| tool.recipe.resolve(&config, false, &Progress::new(true)));
    recipe.map_err(|e| format!("{e:#}"))
}

#[test]
fn without_flags_it_is_gptq() {
    let r = resolved("").unwrap();
    assert_eq!((r.experts.algorithm, r.mw.algorithm), (Algorithm::Gptq, Algorithm::Gptq));
    assert_eq!((r.experts.scheme.to_string(), r.mw.scheme.to_string()), ("w4a16".into(), "w8a16".into()));
    assert_eq!(r.ignore, DEFAULT_IGNORE);
    assert_eq!(r.shard_size, gptoss::recipe::SHARD_SIZE);
    assert_eq!(r.kernels, Kernels::Absent, "the machine is not asked where nothing depends on it");
}

#[test]
fn every_flag_arrives() {
    let r = resolved(
        "--algo rtn --experts-algo awq --experts-type int4 --mw-type int6 --group-size 64 --mw-group-size channel \
         --observer mse --asymmetric --mw-symmetry symmetric --extra-ignore q_proj,k_proj --extra-ignore re:.*v_proj \
         --block-size 64 --dampening-frac 0.05 --actorder off --static-groups --awq-grid 10 --smoothquant-strength 0.7 \
         --with-sparse --mask 4:8 --sparse-algo wanda --no-sequential-update --few-tokens all-experts \
         --few-tokens-threshold 1 --router-weighted --kernels present --auto-detect-experts --shard-size 1MB",
    )
    .unwrap();
    assert_eq!((r.experts.algorithm, r.mw.algorithm), (Algorithm::Awq, Algorithm::Rtn));
    assert_eq!((r.experts.scheme.to_string(), r.mw.scheme.to_string()), ("w4a16".into(), "w6a16".into()));
    assert_eq!((r.experts.group_size, r.mw.group_size), (GroupSize::Size(64), GroupSize::Channel));
    assert_eq!((r.experts.symmetric, r.mw.symmetric, r.mw.observer), (false, true, Observer::Mse));
    assert_eq!(r.ignore[3..], ["q_proj", "k_proj", "re:.*v_proj"]);
    assert_eq!((r.gptq.block_size, r.gptq.dampening_frac, r.gptq.actorder), (64, 0.05, ActOrder::Off));
    assert_eq!((r.awq.n_grid, r.smoothquant.unwrap().strength), (10, 0.7));
    let s = r.sparsity.unwrap();
    assert_eq!((s.algorithm, s.mask.to_string(), s.sparsity, s.block_size), (Pruner::Wanda, "4:8".into(), 0.5, 64));
    let c = r.calibration;
    assert_eq!((c.sequential_update, c.few_tokens, c.few_tokens_threshold), (false, FewTokens::AllExperts, 1.0));
    assert!(c.router_weighted && r.kernels == Kernels::Present && r.shard_size == 1_000_000);
}

#[test]
fn other_tools_spellings_mean_the_same() {
    for (theirs, ours) in [
        ("--method rtn", "--algo rtn"),
        ("--groupsize -1", "--group-size channel"),
        ("--blocksize 64 --percdamp .02", "--block-size 64 --dampening-frac 0.02"),
        ("--actorder", "--actorder static"),
        ("--actorder weight", "--actorder true"),
        ("--experts w4a16", "--experts-scheme w4a16"),
        ("--mw w8a8", "--mw-type int8 --mw-scheme w8a8"),
        ("--sequential-update", ""),
        ("--allow-fallback --yes --allow-fallback --with-sparse --with-sparse --yes", "--with-sparse"),
        ("--experts-regex re:.*mlp.experts.*", ""),
    ] {
        assert_eq!(resolved(theirs), resolved(ours), "{theirs}");
        assert!(resolved(theirs).is_ok(), "{theirs}");
    }
}

#[test]
fn a_regular_expression_says_what_the_experts_are() {
    let r = resolved(r"--experts-regex re:.*layers\.[0-3]\.mlp\.experts.* --experts w4a16 --mw w8a8").unwrap();
    let [over] = &r.overrides[..] else { panic!("{:?}", r.overrides) };
    assert_eq!((over.targets[0].as_str(), over.layer.scheme), ("mlp.experts", r.mw.scheme));
    assert_eq!(r.experts.scheme.to_string(), "w4a16");
    let also = resolved("--experts-regex re:.*(mlp.experts.*|o_proj)").unwrap();
    assert_eq!(also.overrides.len(), 1);
    assert_eq!(also.overrides[0].layer, also.experts);
    assert!(resolved("--experts-regex re:.*w1").unwrap_err().contains("--experts-regex re:.*w1: matches no module"));
    assert!(resolved("--experts-regex experts").unwrap_err().contains("wanted re: and a regular expression"));
}

#[test]
fn what_contradicts_itself_is_refused() {
    for (line, want) in [
        ("--experts w4a16 --experts-type int8", "--experts-scheme w4a16 does not have weights of --experts-type int8"),
        ("--mw fp8 --mw-type int8", "--mw-scheme fp8 does not have weights of --mw-type int8"),
        ("--mw-type int9", "wanted int2 to int8, fp4, fp6"),
        ("--mask 2:4", "--with-sparse"),
        ("--sparsity 0.5", "--with-sparse"),
        ("--sparse-algo wanda", "--with-sparse"),
        ("--with-sparse --mask 2:4 --sparsity 0.7", "a mask of 2:4 makes a sparsity of 0.5, not of 0.7"),
        ("--with-sparse --mask 4:2", "is no mask"),
        ("--static-groups false", "scales are always fitted once"),
        ("--actorder group", "weight_g_idx"),
        ("--algo awq", "the other weights: AWQ is for w4a16, not for w8a16; take the algorithm gptq with w8a16"),
        ("--experts-algo awq --experts w4a8", "the experts: AWQ is for w4a16"),
        ("--experts fp8 --asymmetric", "the experts: fp8 has no zero points"),
        ("--experts w4a8 --kernels absent", "--allow-fallback"),
        ("--symmetric --asymmetric", "cannot be used with"),
        ("--sequential-update --no-sequential-update", "cannot be used with"),
        ("--config a --recipe b", "cannot be used with"),
        ("--config a --experts w4a16", "--config a says that already: leave out --experts-scheme"),
        ("--recipe a --mw-algo rtn", "--recipe a says that already: leave out --mw-algo"),
        ("--recipe a --with-sparse", "leave out --with-sparse"),
        ("--recipe /nowhere/r.yaml", "cannot open /nowhere/r.yaml"),
        ("--few-tokens none", "possible values: rtn, all-experts, weighted"),
        ("--smoothquant-strength 2", "SmoothQuant's strength is 2, wanted 0 to 1"),
        ("--observer mad", "there is no observer"),
    ] {
        let e = resolved(line).unwrap_err();
        assert!(e.contains(want), "{line}: {e}");
    }
}

#[test]
fn kernels_that_are_named_do_not_depend_on_the_machine() {
    let there = resolved("--experts w4a8 --kernels present --allow-fallback").unwrap();
    assert_eq!((there.kernels, there.experts.scheme.to_string()), (Kernels::Present, "w4a8".into()));
    let not = resolved("--experts w4a8 --mw w4a8 --kernels absent --allow-fallback").unwrap();
    assert_eq!(
        (not.kernels, not.experts.scheme.to_string(), not.mw.scheme),
        (Kernels::Absent, "w4a16".into(), not.experts.scheme)
    );
    assert_eq!(
        not.notes,
        ["w4a16 in place of w4a8 for the experts and the other weights: its kernels are not installed"]
    );
}
