use super::super::{ActOrder, FewTokens, GroupSize, Observer, Pruner, Rules};
use super::*;
use crate::algorithms::Algorithm;
use crate::model::{Linear, Proj};

fn recipe(text: &str) -> Result<Recipe> {
    let config = ModelConfig::parse(Path::new("m"), &ModelConfig::published("gpt-oss-20b").unwrap()).unwrap();
    parse(Path::new("r.yaml"), text, &config)
}

fn refusal(text: &str) -> String {
    recipe(text).map(|r| format!("{r:?}")).unwrap_err().to_string()
}

fn layer(algorithm: Algorithm, scheme: &str, group_size: GroupSize) -> LayerRecipe {
    LayerRecipe { algorithm, group_size, ..LayerRecipe::new(scheme.parse().unwrap()) }
}

/// The scheme that a recipe gives to a module of layer 3, expert 5.
fn of(recipe: &Recipe, proj: Proj) -> String {
    let rules = Rules::new(recipe).unwrap();
    let layer = rules.layer(&Linear { proj, layer: 3, expert: 5 });
    layer.map_or("-".into(), |l| format!("{} {}", l.algorithm.tag(), l.scheme))
}

#[test]
fn a_preset_for_every_linear_layer() {
    let got = recipe(
        "quant_stage:
  quant_modifiers:
    GPTQModifier:
      targets: Linear
      scheme: W4A16
      ignore: [mlp.router, lm_head]
      block_size: 64
      dampening_frac: 0.02
",
    )
    .unwrap();
    let want = layer(Algorithm::Gptq, "w4a16", GroupSize::Size(128));
    assert_eq!((&got.experts, &got.mw), (&want, &want));
    assert_eq!(got.ignore, ["embed_tokens", "mlp.router", "lm_head"]);
    assert_eq!((got.gptq.block_size, got.gptq.dampening_frac, got.gptq.actorder), (64, 0.02, ActOrder::Static));
    assert!(got.overrides.is_empty() && got.calibration.few_tokens == FewTokens::Weighted);
}

#[test]
fn config_groups_become_the_two_classes() {
    let got = recipe(
        r"default_stage:
  default_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8}
    GPTQModifier:
      ignore: [lm_head, 're:.*mlp.router']
      config_groups:
        group_0:
          targets: ['re:.*experts.*']
          weights: {num_bits: 4, type: int, symmetric: false, strategy: group, group_size: 64, actorder: weight, observer: mse}
        group_1:
          targets: ['re:.*self_attn.*']
          weights: {num_bits: 8, strategy: channel}
          input_activations: {num_bits: 8, type: int, symmetric: true, strategy: token, dynamic: true}
          output_activations: null
",
    )
    .unwrap();
    let experts = layer(Algorithm::Gptq, "w4a16", GroupSize::Size(64));
    assert_eq!(got.experts, LayerRecipe { symmetric: false, observer: Observer::Mse, ..experts });
    assert_eq!(got.mw, layer(Algorithm::Gptq, "w8a8", GroupSize::Channel));
    assert!(got.overrides.is_empty() && got.smoothquant.unwrap().strength == 0.8);
    assert_eq!(got.ignore, ["embed_tokens", "lm_head", "re:.*mlp.router"]);
}

#[test]
fn names_count_before_expressions_and_later_modifiers_before_earlier() {
    let got = recipe(
        "QuantizationModifier: {targets: Linear, scheme: W8A16, ignore: [lm_head]}
GPTQModifier:
  ignore: [lm_head, 're:.*layers.3.*k_proj']
  scheme:
    W8A8: ['re:.*self_attn.*']
    W4A16: ['model.layers.3.self_attn.q_proj']
",
    )
    .unwrap();
    assert_eq!(of(&got, Proj::Q), "GPTQ w4a16");
    assert_eq!(of(&got, Proj::V), "GPTQ w8a8");
    assert_eq!(of(&got, Proj::K), "RTN w8a16", "what the second modifier ignores is left to the first");
    assert_eq!(of(&got, Proj::Up), "RTN w8a16");
    assert_eq!(of(&got, Proj::Router), "-", "in transformers it is no Linear");
    assert_eq!((of(&got, Proj::LmHead), of(&got, Proj::Embed)), ("-".into(), "-".into()));
}

#[test]
fn awq_takes_its_scheme_from_itself_or_from_behind() {
    let own = recipe("AWQModifier: {scheme: W4A16_ASYM, ignore: [mlp.router, lm_head], duo_scaling: false}").unwrap();
    let behind = recipe(
        "AWQModifier:
  duo_scaling: false
  mappings:
    - {smooth_layer: 're:.*input_layernorm', balance_layers: ['re:.*q_proj', 're:.*k_proj', 're:.*v_proj']}
    - smooth_layer: 're:.*post_attention_layernorm'
      balance_layers: ['re:.*router', 're:.*gate_proj', 're:.*up_proj']
QuantizationModifier: {scheme: W4A16_ASYM, ignore: [mlp.router, lm_head]}",
    )
    .unwrap();
    assert_eq!(own, behind);
    assert!(!own.awq.duo_scaling && own.awq.n_grid == 20 && !own.experts.symmetric);
    assert_eq!(of(&own, Proj::Down), "AWQ w4a16");
    for (text, want) in [
        ("AWQModifier:", "AWQModifier has no scheme"),
        (
            "AWQModifier: {}\nGPTQModifier: {scheme: W4A16}",
            "GPTQModifier: stands behind an AWQModifier without a scheme",
        ),
        ("AWQModifier: {duo_scaling: both, scheme: W4A16}", "AWQModifier.duo_scaling: both is not in this version"),
        (
            "AWQModifier: {scheme: W4A16, mappings: [{smooth_layer: 're:.*up_proj', balance_layers: ['re:.*down_proj']}]}",
            "AWQModifier.mappings: exact for gpt-oss are input_layernorm",
        ),
        (
            "SmoothQuantModifier: {mappings: [[['re:.*q_proj', 're:.*k_proj', 're:.*v_proj'], 're:.*input_layernorm'], [['re:.*gate_proj', 're:.*up_proj'], 're:.*post_attention_layernorm']]}",
            "with router, gate_proj, up_proj",
        ),
    ] {
        let e = refusal(text);
        assert!(e.contains(want), "{text}: {e}");
    }
}

#[test]
fn pruning_stands_before_rounding_or_alone() {
    let got = recipe(
        "sparsity_stage:
  run_type: oneshot
  sparsity_modifiers:
    SparseGPTModifier: {sparsity: 0.5, mask_structure: '2:4', sequential_update: true, ignore: [mlp.router, lm_head]}
quantization_stage:
  quantization_modifiers:
    GPTQModifier: {scheme: W4A16, ignore: [mlp.router, lm_head]}",
    )
    .unwrap();
    let s = got.sparsity.unwrap();
    assert_eq!((s.algorithm, s.mask.to_string(), s.sparsity), (Pruner::Sparsegpt, "2:4".into(), 0.5));
    assert!(s.targets.is_empty() && s.ignore.is_empty());
    assert_eq!(got.ignore, ["embed_tokens", "mlp.router", "lm_head"]);
    let alone = recipe("WandaPruningModifier: {sparsity: 0.6, targets: ['re:.*experts.*']}").unwrap();
    assert_eq!((alone.experts.scheme, alone.mw.scheme), (SchemeName::Dense, SchemeName::Dense));
    assert_eq!(alone.sparsity.unwrap().targets, ["re:.*experts.*"]);
}

#[test]
fn what_cannot_be_meant_is_refused_with_its_path() {
    let group = |weights: &str| {
        format!("GPTQModifier: {{config_groups: {{group_0: {{targets: [Linear], weights: {{{weights}}}}}}}}}")
    };
    for (text, want) in [
        ("q_stage: {m_modifiers: {GPTQModifer: {}}}", "r.yaml: q_stage.m_modifiers.GPTQModifer: is no stage"),
        ("q_stage: {m_modifiers: {GPTQModifer: {}}}", "did you mean GPTQModifier?"),
        ("ConstantPruningModifier: {}", "ConstantPruningModifier: is not in this version"),
        (
            "GPTQModifier: {scheme: W4A16, dampening: 0.1}",
            "GPTQModifier.dampening: is no known key; did you mean dampening_frac?",
        ),
        ("GPTQModifier: {scheme: W4A61}", "there is no scheme W4A61; did you mean W4A16?"),
        (
            "GPTQModifier: {scheme: NVFP4}",
            "GPTQModifier.scheme: NVFP4 is not in this version; it has UNQUANTIZED, W8A16",
        ),
        ("GPTQModifier: {}", "has neither scheme nor config_groups"),
        ("GPTQModifier: {scheme: W4A16, actorder: group}", "weight_g_idx"),
        ("GPTQModifier: {scheme: W4A16, kv_cache_scheme: {num_bits: 8}}", "a quantized cache is not in this version"),
        ("GPTQModifier: {scheme: W4A16, targets: [Embedding]}", "the class Embedding is not quantized"),
        ("GPTQModifier: {scheme: W4A16, ignore: [lm_haed]}", "the ignore pattern \"lm_haed\" matches no module"),
        ("GPTQModifier: {scheme: {W4A16: ['re:.*w1']}}", "pattern \"re:.*w1\" matches no module"),
        (
            "QuantizationModifier: {scheme: {W8A8: ['re:.*q_proj']}}\nGPTQModifier: {scheme: {W4A16: ['re:.*self_attn.*']}}",
            "\"re:.*q_proj\" has no effect: \"re:.*self_attn.*\" hides it",
        ),
        ("GPTQModifier: {scheme: W8A8}\nQuantizationModifier: {scheme: W4A16}", "has no effect"),
        ("GPTQModifier: {scheme: W4A16, config_groups: {}}", "has scheme and config_groups"),
        (&group("num_bits: 4, strategy: block"), "strategy block needs block_structure"),
        (&group("num_bits: 4, strategy: token"), "strategy: token is not in this version"),
        (&group("num_bits: 4, group_siz: 1"), "group_0.weights.group_siz: is no known key; did you mean group_size?"),
        (
            &group("num_bits: 6, type: float, strategy: channel"),
            "weights float6 with inputs none and these strategies are not",
        ),
        (&group("num_bits: 8, strategy: block, block_structure: [64, 64]"), "blocks are of [128, 128] here"),
        ("SparseGPTModifier: {sparsity: 0.5, owl_m: 5}", "one sparsity is for all layers"),
        ("- GPTQModifier", "is a list, wanted an object"),
        ("a: [", "r.yaml: is not YAML"),
        ("GPTQModifier: {scheme: W4A16, scheme: W8A8}", "duplicate"),
        ("SmoothQuantModifier: {}", "has no modifier that quantizes or prunes"),
    ] {
        let e = refusal(text);
        assert!(e.contains(want), "{text}: {e}");
    }
}
