// The expected reward of best-of-n, estimated from one scored pool. The same estimator as in reranker/estimators.py; a
// test compares the two.

/**
 * E[max of n] = Σ_i C(i, n−1) · s₍ᵢ₎ / C(N, n) over the scores in ascending order, i from 0: the mean over all ways to
 * draw n of the N.
 *
 * Each weight is computed from the previous one, from the largest score down, so that no binomial overflows.
 */
export function expectedMax(scores, n) {
  const size = scores.length;
  if (!(n >= 1 && n <= size)) throw new RangeError(`n = ${n} is not between 1 and the pool of ${size}`);
  const descending = scores.toSorted((a, b) => b - a);
  let weight = n / size;
  let sum = 0;
  for (let index = 0; index <= size - n; index += 1) {
    const rank = size - 1 - index;
    sum += weight * descending[index];
    weight *= (rank - n + 1) / rank;
  }
  return sum;
}
