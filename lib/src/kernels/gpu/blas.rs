//! cuBLAS, where it is installed: what products of floats are compared with.

use std::ffi::c_void;

use cudarc::cublas::{result, sys};

use super::{Buffer, Gpu};
use crate::error::{Error, Result};
use crate::formats::float::Float;

/// A handle whose work goes where the kernels' goes.
pub struct Blas<'g> {
    handle: sys::cublasHandle_t,
    // What cuBLAS works in; given, so that launches can be captured.
    _workspace: Buffer<'g>,
}

/// Bytes of the workspace: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

fn failed(action: &str) -> impl FnOnce(result::CublasError) -> Error {
    let action = format!("{action} with cuBLAS");
    move |e| Error::Gpu { action, reason: format!("{e:?}") }
}

impl<'g> Blas<'g> {
    /// Opens it; `None` where the library is not found.
    pub fn open(gpu: &'g Gpu) -> Result<Option<Self>> {
        // SAFETY: only opens the library. cudarc panics where it calls into one that is not there, so this comes first.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let workspace = gpu.filled(WORKSPACE, 0)?;
        let handle = result::create_handle().map_err(failed("begin"))?;
        // SAFETY: handle, stream and workspace live as long as this.
        unsafe {
            result::set_stream(handle, gpu.stream.cast()).map_err(failed("use the stream"))?;
            let at = workspace.address() as *mut c_void;
            sys::cublasSetWorkspace_v2(handle, at, workspace.bytes()).result().map_err(failed("use a workspace"))?;
        }
        Ok(Some(Self { handle, _workspace: workspace }))
    }

    /// `out` [m, n] = `input` [m, k] `weight` [n, k]^T, all of 16-bit `float`, summed in f32. `first` is the number of the first row that counts in
    /// input and output, `layer` that of the weight.
    ///
    /// # Panics
    /// Where something is too short.
    pub fn product(
        &self,
        (weight, layer): (&Buffer, usize),
        input: &Buffer,
        out: &Buffer,
        first: usize,
        (m, n, k): (usize, usize, usize),
        float: Float,
    ) -> Result<()> {
        let size = float.size() as u64;
        assert_eq!(size, 2, "16-bit floats");
        assert!(weight.bytes() >= (layer + 1) * n * k * 2 && input.bytes() >= (first + m) * k * 2, "all there");
        assert!(out.bytes() >= (first + m) * n * 2, "the output has room");
        out.written();
        let ty = type_of(float);
        let (one, zero) = (1f32, 0f32);
        let place = |b: &Buffer, numbers: usize| (b.address() + numbers as u64 * size) as *mut c_void;
        let transposed = sys::cublasOperation_t::CUBLAS_OP_T;
        let plain = sys::cublasOperation_t::CUBLAS_OP_N;
        // Its matrices lie by columns: the output is seen as [n, m].
        // SAFETY: lengths were checked above; the scalars are read before this returns.
        let done = unsafe {
            result::gemm_ex(
                self.handle,
                transposed,
                plain,
                n as i32,
                m as i32,
                k as i32,
                (&raw const one).cast(),
                place(weight, layer * n * k),
                ty,
                k as i32,
                place(input, first * k),
                ty,
                k as i32,
                (&raw const zero).cast(),
                place(out, first * n),
                ty,
                n as i32,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        };
        done.map_err(failed("multiply"))
    }
}

/// The products of all experts of a layer, as one call.
pub struct Grouped<'g> {
    /// Device addresses of weights, inputs and outputs, an expert each.
    places: [Buffer<'g>; 3],
    /// Rows of each expert.
    rows: Vec<i32>,
}

impl<'g> Blas<'g> {
    /// Whether this cuBLAS multiplies groups in one call: 12.5 and later do.
    pub fn has_groups(&self) -> bool {
        let mut version = 0;
        // SAFETY: it writes a number.
        let told = unsafe { sys::cublasGetVersion_v2(self.handle, &mut version) }.result();
        told.is_ok() && version >= 120_500
    }

    /// What [`Self::grouped`] needs: `rows` of each expert, of 16-bit numbers, inputs and outputs of the experts one behind the other.
    pub fn groups(
        &self,
        gpu: &'g Gpu,
        weights: &Buffer,
        (input, out): (&Buffer, &Buffer),
        rows: &[usize],
        (n, k): (usize, usize),
    ) -> Result<Grouped<'g>> {
        let total: usize = rows.iter().sum();
        assert!(weights.bytes() >= rows.len() * n * k * 2, "weights are all there");
        assert!(input.bytes() >= total * k * 2 && out.bytes() >= total * n * 2, "the rest too");
        let mut places: [Vec<u64>; 3] = Default::default();
        let mut first = 0;
        for (expert, &r) in rows.iter().enumerate().filter(|(_, r)| **r > 0) {
            let at = [(weights, expert * n * k), (input, first * k), (out, first * n)];
            places.iter_mut().zip(at).for_each(|(list, (b, numbers))| list.push(b.address() + 2 * numbers as u64));
            first += r;
        }
        let [a, b, c] = places;
        let rows = rows.iter().filter(|r| **r > 0).map(|&r| r as i32).collect();
        Ok(Grouped { places: [gpu.upload(&a)?, gpu.upload(&b)?, gpu.upload(&c)?], rows })
    }

    /// [`Self::product`] of every expert that has rows.
    pub fn grouped(&self, groups: &Grouped, (n, k): (usize, usize), float: Float) -> Result<()> {
        let count = groups.rows.len();
        let same = |value: i32| vec![value; count];
        let (n, k, sizes) = (same(n as i32), same(k as i32), same(1));
        let transposed = vec![sys::cublasOperation_t::CUBLAS_OP_T; count];
        let plain = vec![sys::cublasOperation_t::CUBLAS_OP_N; count];
        let (ones, zeros) = (vec![1f32; count], vec![0f32; count]);
        let at = |i: usize| groups.places[i].address() as *const *const c_void;
        let ty = type_of(float);
        // SAFETY: every array has an entry a group, addresses and lengths were checked when they were made, and arrays of this side are read before
        // this returns.
        let done = unsafe {
            sys::cublasGemmGroupedBatchedEx(
                self.handle,
                transposed.as_ptr(),
                plain.as_ptr(),
                n.as_ptr(),
                groups.rows.as_ptr(),
                k.as_ptr(),
                ones.as_ptr().cast(),
                at(0),
                ty,
                k.as_ptr(),
                at(1),
                ty,
                k.as_ptr(),
                zeros.as_ptr().cast(),
                at(2) as *const *mut c_void,
                ty,
                n.as_ptr(),
                count as i32,
                sizes.as_ptr(),
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            )
        };
        done.result().map_err(failed("multiply groups"))
    }
}

fn type_of(float: Float) -> sys::cudaDataType {
    match float {
        Float::F16 => sys::cudaDataType::CUDA_R_16F,
        _ => sys::cudaDataType::CUDA_R_16BF,
    }
}

impl Drop for Blas<'_> {
    fn drop(&mut self) {
        // SAFETY: it was created, and what it launched keeps what it needs.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
