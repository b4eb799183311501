//! CUDA kernels: their sources, which this program carries, the builds of them that are installed, and how they are launched.

pub mod arch;
pub mod build;
pub mod cutlass;
pub mod gpu;
pub mod store;
pub mod toolkit;

/// Files of `kernels/`, by name: what a build compiles, and what that includes.
pub const SOURCES: [(&str, &str); 21] = [
    ("activations.cuh", include_str!("../../../kernels/activations.cuh")),
    ("combine_experts.cu", include_str!("../../../kernels/combine_experts.cu")),
    ("common.cuh", include_str!("../../../kernels/common.cuh")),
    ("dequantize_mxfp4.cu", include_str!("../../../kernels/dequantize_mxfp4.cu")),
    ("fake_quantize.cu", include_str!("../../../kernels/fake_quantize.cu")),
    ("gemm.cuh", include_str!("../../../kernels/gemm.cuh")),
    ("group_rows.cu", include_str!("../../../kernels/group_rows.cu")),
    ("hopper_gemm.cu", include_str!("../../../kernels/hopper_gemm.cu")),
    ("mask_2_4.cu", include_str!("../../../kernels/mask_2_4.cu")),
    ("mma.cuh", include_str!("../../../kernels/mma.cuh")),
    ("mxfp4_a16.cu", include_str!("../../../kernels/mxfp4_a16.cu")),
    ("mxfp4_a8.cu", include_str!("../../../kernels/mxfp4_a8.cu")),
    ("normalize_activations.cu", include_str!("../../../kernels/normalize_activations.cu")),
    ("operands.cuh", include_str!("../../../kernels/operands.cuh")),
    ("quantize_activations.cu", include_str!("../../../kernels/quantize_activations.cu")),
    ("small_floats.cuh", include_str!("../../../kernels/small_floats.cuh")),
    ("w4a16.cu", include_str!("../../../kernels/w4a16.cu")),
    ("w4a8.cu", include_str!("../../../kernels/w4a8.cu")),
    ("w8a8.cu", include_str!("../../../kernels/w8a8.cu")),
    ("warpgroup.cuh", include_str!("../../../kernels/warpgroup.cuh")),
    ("wgmma.cuh", include_str!("../../../kernels/wgmma.cuh")),
];

/// The source, without its ending, that needs CUTLASS and becomes a library with code for 9.0a.
pub const HOPPER: &str = "hopper_gemm";
/// That library.
pub const HOPPER_LIBRARY: &str = "libgptoss_hopper.so";

/// The sources that are compiled for every architecture, without their ending.
pub fn kernels() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().filter_map(|(name, _)| name.strip_suffix(".cu")).filter(|name| *name != HOPPER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_is_carried() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../kernels");
        let mut there: Vec<String> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|n| n.ends_with(".cu") || n.ends_with(".cuh"))
            .collect();
        there.sort();
        assert_eq!(there, SOURCES.map(|s| s.0));
    }
}
