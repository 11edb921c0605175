// What best-of-n is worth, from one scored pool: reranker/estimators.py once more, and a test compares the two.

/**
 * E[max of n] = Σ_i C(i, n−1) · s₍ᵢ₎ / C(N, n) over the scores in ascending order, i from 0: the mean over all ways to
 * have drawn only n of the N.
 *
 * The weights are computed from the largest down, each from the one before, so that no binomial overflows.
 */
export function expectedMax(scores, n) {
  const size = scores.length;
  if (!(n >= 1 && n <= size)) throw new RangeError(`n = ${n} is not between 1 and the pool of ${size}`);
  const descending = scores.toSorted((a, b) => b - a);
  let weight = n / size;
  let sum = 0;
  for (let place = 0; place <= size - n; place += 1) {
    const rank = size - 1 - place;
    sum += weight * descending[place];
    weight *= (rank - n + 1) / rank;
  }
  return sum;
}
