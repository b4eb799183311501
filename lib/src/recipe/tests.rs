use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

use super::*;

fn layer() -> impl Strategy<Value = LayerRecipe> {
    let algorithm = prop_oneof![Just(Algorithm::Rtn), Just(Algorithm::Gptq), Just(Algorithm::Awq)];
    let int = (2u8..=8, any::<bool>()).prop_map(|(bits, int8_activations)| SchemeName::Int { bits, int8_activations });
    let scheme = prop_oneof![
        Just(SchemeName::Keep),
        Just(SchemeName::Dense),
        Just(SchemeName::Fp8),
        Just(SchemeName::Mx(crate::formats::minifloat::Minifloat::E2M1)),
        int
    ];
    let group = prop_oneof![Just(GroupSize::Auto), Just(GroupSize::Channel), (1usize..4096).prop_map(GroupSize::Size)];
    let observer = prop_oneof![Just(Observer::Minmax), Just(Observer::Mse)];
    (algorithm, scheme, any::<bool>(), group, observer).prop_map(
        |(algorithm, scheme, symmetric, group_size, observer)| LayerRecipe {
            algorithm,
            scheme,
            symmetric,
            group_size,
            observer,
        },
    )
}

fn patterns() -> impl Strategy<Value = Vec<String>> {
    vec("(re:|glob:)?[a-z.*_]{1,12}", 0..3)
}

fn sparsity() -> impl Strategy<Value = Sparsity> {
    let mask =
        prop_oneof![Just(Mask::Unstructured), (1usize..16).prop_map(|zeros| Mask::Structured { zeros, of: 2 * zeros })];
    let algorithm = prop_oneof![Just(Pruner::Sparsegpt), Just(Pruner::Wanda)];
    (algorithm, mask, 0.0..1.0, 1usize..512, 0.0..1.0, patterns(), patterns()).prop_map(
        |(algorithm, mask, sparsity, block_size, dampening_frac, targets, ignore)| Sparsity {
            algorithm,
            mask,
            sparsity,
            block_size,
            dampening_frac,
            targets,
            ignore,
        },
    )
}

fn calibration() -> impl Strategy<Value = Calibration> {
    let few = prop_oneof![Just(FewTokens::Rtn), Just(FewTokens::AllExperts), Just(FewTokens::Weighted)];
    (any::<bool>(), few, 0.0..1.0, any::<bool>()).prop_map(
        |(sequential_update, few_tokens, few_tokens_threshold, router_weighted)| Calibration {
            sequential_update,
            few_tokens,
            few_tokens_threshold,
            router_weighted,
        },
    )
}

prop_compose! {
    fn recipe()(
        experts in layer(),
        mw in layer(),
        overrides in vec((patterns(), patterns(), layer()), 0..3),
        ignore in patterns(),
        sparsity in option::of(sparsity()),
        strength in option::of(0.0..1.0),
        dampening_frac in 0.0..1.0,
        off in any::<bool>(),
        calibration in calibration(),
        present in any::<bool>(),
        notes in vec(".{0,20}", 0..2),
    ) -> Recipe {
        let new = |(targets, ignore, layer)| Override { targets, ignore, layer };
        let actorder = if off { ActOrder::Off } else { ActOrder::Static };
        Recipe {
            overrides: overrides.into_iter().map(new).collect(),
            ignore,
            sparsity,
            smoothquant: strength.map(|strength| SmoothQuant { strength }),
            gptq: Gptq { dampening_frac, actorder, ..Gptq::default() },
            calibration,
            kernels: if present { Kernels::Present } else { Kernels::Absent },
            notes,
            ..Recipe::new(experts, mw)
        }
    }
}

proptest! {
    #[test]
    fn a_recipe_comes_back_from_its_json(recipe in recipe()) {
        let json = serde_json::to_string(&recipe).unwrap();
        prop_assert_eq!(serde_json::from_str::<Recipe>(&json).unwrap(), recipe);
    }
}

#[test]
fn an_override_leaves_what_it_ignores_to_those_before() {
    let of = |scheme: &str| LayerRecipe::new(scheme.parse().unwrap());
    let over = |targets: &str, ignore: &[&str], scheme: &str| Override {
        targets: vec![targets.into()],
        ignore: ignore.iter().map(|&i| i.to_owned()).collect(),
        layer: of(scheme),
    };
    let mut recipe = Recipe::new(of("w4a16"), of("w8a16"));
    recipe.overrides = vec![over("self_attn", &[], "w8a8"), over("re:.*", &["q_proj", "mlp.experts"], "w6a16")];
    let rules = Rules::new(&recipe).unwrap();
    let scheme = |proj| rules.layer(&Linear { proj, layer: 0, expert: 0 }).unwrap().scheme.to_string();
    use crate::model::Proj::{Gate, K, Q, Router};
    assert_eq!([Q, K, Gate, Router].map(scheme), ["w8a8", "w6a16", "w4a16", "w6a16"]);
}
